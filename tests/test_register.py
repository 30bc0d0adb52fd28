"What the notebook of ship.register cannot show: an Ollama that fails, and one that takes no models."

import hashlib
import re

import ollama
import pytest
from ollama_server import OllamaServer

from so8t.flow.config import Ollama
from so8t.flow.problem import Problem
from so8t.ship import register

TEXT = "{{ range .Messages }}{{ .Content }}{{ end }}"
VALUES = {"temperature": 0.0, "stop": ["<|end|>", "</s>"]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model-q8_0.gguf"
    path.write_bytes(b"GGUF" + bytes(100_000))
    return path


def test_a_registration_that_failed_is_made_good_without_sending_the_file_again(file):
    with OllamaServer() as server:
        server.fails = [500]
        with pytest.raises(Problem, match="did not register tiny:a .out of disk"):
            register.register(server.host, "tiny:a", file, TEXT, VALUES)
        assert not server.models and server.uploads == 1
        done = register.register(server.host, "tiny:a", file, TEXT, VALUES)
        assert server.uploads == 1 and done["digest"] == server.models["tiny:a"]["digest"]
        assert done["blob"] == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def test_the_official_client_sees_what_was_registered(file):
    with OllamaServer() as server:
        register.register(server.host, "tiny:a", file, TEXT, VALUES)
        shown = ollama.Client(server.host).show("tiny:a")
    assert shown.template == TEXT and shown.parameters == 'temperature 0.0\nstop "<|end|>"\nstop "</s>"'


def test_another_file_or_another_template_is_another_model(file, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes() + b"!")
    with OllamaServer() as server:
        cases = ((file, TEXT), (other, TEXT), (file, TEXT + "!"), (file, TEXT))
        digests = [register.register(server.host, "tiny:a", path, text, VALUES)["digest"] for path, text in cases]
    assert len(set(digests)) == 3 and digests[0] == digests[3] and len(server.models) == 1


def test_a_compatible_server_that_takes_no_models_is_named(file):
    with OllamaServer(takes_models=False) as server:
        with pytest.raises(Problem, match=re.escape(f"{server.host}: did not register tiny:a")):
            register.register(server.host, "tiny:a", file, TEXT, VALUES)


@pytest.mark.parametrize("host", ["http://127.0.0.1:9", "http://[", "nonsense"])
def test_nobody_there_is_nobody_there(host):
    assert register.version(host) is None


@pytest.mark.parametrize("name, slug", [
    ("SmolLM2-135M-Instruct-so8t", "smollm2-135m-instruct-so8t"), ("私のモデル v1", "v1")])
def test_names_are_those_that_ollama_takes(name, slug):
    assert register.slug(name) == slug


def test_the_modelfile_keeps_marks_as_they_are():
    values = VALUES | {"num_ctx": Ollama().context}
    lines = register.modelfile("./a.gguf", "<|user|>\n{{ .Content }}", values).splitlines()
    assert lines[0] == "FROM ./a.gguf" and lines[1] == 'TEMPLATE """<|user|>'
    assert lines[-3:] == ['PARAMETER stop "<|end|>"', 'PARAMETER stop "</s>"', "PARAMETER num_ctx 2048"]
