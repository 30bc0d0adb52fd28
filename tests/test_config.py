"""Every mistake in a configuration is one clear line, and a frozen one comes back exactly."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from so8t.flow import config as configs
from so8t.flow.problem import Problem

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    "A workspace of its own, with one configuration."
    (tmp_path / "settings.ini").write_text(
        "[DEFAULT]\nlib_name = so8t\n[so8t]\nruns = runs\nconfigs = configs\nstages = nbs/stages\n"
        "config = configs/a.yaml\norder = base collect cleanse sft\n",
        encoding="utf-8",
    )
    (tmp_path / "configs").mkdir()
    monkeypatch.setenv("SO8T_WORKSPACE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *sets: str) -> configs.Resolved:
    Path("configs/a.yaml").write_text(text, encoding="utf-8")
    return configs.load("configs/a.yaml", list(sets))


def complaint(text: str, *sets: str) -> str:
    with pytest.raises(Problem) as caught:
        load(text, *sets)
    assert caught.value.code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


MISTAKES = {
    "training: {sft: {lerning_rate: 1}}": "a.yaml:1: training.sft.lerning_rate: unknown key; did you mean training.sft",
    "training:\n  sft:\n    bach: 4\n": "a.yaml:3: training.sft.bach: unknown key; did you mean training.sft.batch?",
    "learning_rate: 1e-4": "learning_rate: unknown key; did you mean training.sft.learning_rate?",
    "zzz: 1": "a.yaml:1: zzz: unknown key; the file has: name, stages, model",
    "model: {zzz: 1}": "model.zzz: unknown key; model has: base, revision, dtype, quantization, tiny",
    "upload: {to: hub}": "upload.to: unknown key; upload has: target, folder, repo, private, token_env",
    "training.sft.batch: 4": "training.sft.batch is no key: keys are single words, nested by indentation",
    "1: 2": "1: unknown key",
    "[a]: 2": "this is no key",
    "<<: {a: 1}": "<< is no key",
    "training: {sft: {batch: 8, micro_batch: 3}}": "training.sft.micro_batch: micro_batch 3 does not divide batch 8",
    "training: {sft: {batch: 8, micro_batch: 16}}": "micro_batch 16 does not divide batch 8",
    "training: {sft: {batch: 4}}": "micro_batch 8 does not divide batch 4",
    "training: {sft: {steps: -3}}": "training.sft.steps: must be greater than or equal to 1, not -3",
    "training: {sft: {steps: 1.5}}": "training.sft.steps: must be a whole number, not 1.5",
    "training: {sft: {steps: many}}": 'training.sft.steps: must be a whole number, not "many"',
    "training: {sft: {steps: '60'}}": 'training.sft.steps: must be a whole number, not "60"',
    "training: {sft: {steps: true}}": "training.sft.steps: must be a whole number, not true",
    "training: {sft: {batch: }}": "training.sft.batch: must be a whole number, not null",
    "training: {sft: {learning_rate: .nan}}": 'must be a number, not ".nan"',
    "training: {sft: {learning_rate: 1e999}}": "1e999 is too large for a number",
    "training: 5": "training: must be a section with keys of its own, not 5",
    "training: [sft]": 'training: must be a section with keys of its own, not ["sft"]',
    "notifications: {bell: yes}": 'notifications.bell: must be true or false, not "yes"',
    "notifications: {bell: 1}": "notifications.bell: must be true or false, not 1",
    "data: {sources: own}": 'data.sources: must be a list, such as [a, b], not "own"',
    "data: {sources: []}": "data.sources: must not be empty",
    "data: {sources: [own, own]}": "data.sources: own is listed twice",
    "data:\n  sources:\n    - own\n    - strongrejct\n": "a.yaml:4: data.sources[1]: strongrejct is none of",
    "data: {languages: [no]}": "data.languages[0]: must be 'en' or 'ja', not \"no\"",
    "model: {revision: 1234567}": "model.revision: must be text (in quotes, if it looks like something else)",
    "model: {base: smolm2}": "did you mean smollm2?",
    "model: {dtype: fp8}": "model.dtype: must be 'float32' or 'bfloat16', not \"fp8\"",
    "model: {tiny: {hidden: 64, heads: 3}}": "model.tiny.heads: 3 heads do not divide hidden 64",
    "resources: {free_disk: 2 parsecs}": "resources.free_disk: must be a size such as",
    "resources: {free_disk: -1}": "resources.free_disk: must be greater than or equal to 0",
    "name: a b": 'name: may hold letters, digits, - and _, not "a b"',
    "stages: []": "stages: must not be empty",
    "stages: base": "stages: must be a list",
    "stages: [base, base]": "stages: base is listed twice",
    "stages: [sft, base]": "stages: sft cannot come before base: settings.ini has the order base, sft",
    "stages: [mine, base, yours, sft, collect]": "stages: sft cannot come before collect",
    "stages: [base, Sft]": "stages[1].name: a stage's name is small letters, digits and _",
    "stages: [5]": "stages[0]: a stage is a name, or {name: ..., timeout: ..., retries: ...}, not 5",
    "stages: [{timeout: 5}]": "stages[0].name: is missing",
    "stages:\n  - base\n  - {name: sft, retry: 1}": "a.yaml:3: stages[1].retry: unknown key; did you mean stages[1]",
    "custom: {greet: hello}": 'custom.greet: must be a section with keys of its own, not "hello"',
    "custom: {copy: {a: 1}}": "custom: copy cannot be used as a name here",
    "name: a\nname: b\n": "a.yaml:2: name is given twice (first in line 1)",
    "training:\n\tseed: 1\n": "a.yaml:2: a tab; indent with spaces",
    "a: [1, 2": "configs/a.yaml: ",
    "a: 1\n---\nb: 2\n": "expected a single document",
    "a: !!binary aGk=": "aGk= is no value that so8t knows",
    "a: !!int x": "x is no value that so8t knows",
    "a: &x [*x]": "is nested too deeply, or contains itself",
    "a: *x": "found undefined alias",
    "a: \x07": "is no YAML",
    "": "configs/a.yaml: is empty",
    "# nothing\n": "configs/a.yaml: is empty",
    "- base\n- sft\n": "configs/a.yaml: must hold keys, such as name: a",
    "hello": "configs/a.yaml: must hold keys",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_each_mistake_is_one_clear_line(text):
    said = complaint(text)
    assert said.startswith("configs/a.yaml:") and MISTAKES[text] in said and len(said) < 400


def test_several_mistakes_are_told_at_once():
    two = complaint("model: {dtyp: float32}\ntraining:\n  sede: 1\n")
    assert "a.yaml:1: model.dtyp: unknown key; did you mean model.dtype?; " in two
    assert "a.yaml:3: training.sede: unknown key; did you mean training.seed?" in two
    many = complaint("".join(f"zz{i}: 1\n" for i in range(9)))
    assert many.startswith("configs/a.yaml:1: zz0: ") and many.endswith("(and 8 more)")


def test_files_that_cannot_be_read(workspace):
    with pytest.raises(Problem, match=r"configs/b.yaml: no such file; did you mean configs/a.yaml\?"):
        load("name: a")
        configs.load("configs/b.yaml")
    with pytest.raises(Problem, match="configs: is a folder; name a .yaml file in it"):
        configs.load("configs")
    Path("configs/latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(Problem, match="configs/latin.yaml: is not UTF-8 text"):
        configs.load("configs/latin.yaml")


def test_marks_of_windows_editors_do_no_harm():
    Path("configs/a.yaml").write_bytes(b"\xef\xbb\xbfname: a\r\nstages: [base]\r\n")
    settings = Path("settings.ini")
    settings.write_bytes(b"\xef\xbb\xbf" + settings.read_bytes())
    assert configs.load("configs/a.yaml").config.name == "a"


def test_numbers_and_words_are_what_they_look_like():
    text = "training: {sft: {learning_rate: 1e-5, weight_decay: 0}}\nmodel: {base: ./on, revision: '123'}\n"
    config = load(text + "custom: {x: {a: [1E3, .5, 5., -1e+2, 0x10, 010]}}").config
    assert (config.training.sft.learning_rate, config.training.sft.weight_decay) == (1e-5, 0.0)
    assert config.custom.x["a"] == [1000.0, 0.5, 5.0, -100.0, "0x10", 10]
    words = load("custom: {x: {a: [no, on, off, yes, y, 12:30, 2026-11-21, 1_000, ~, null, TRUE]}}").config
    assert words.custom.x["a"] == ["no", "on", "off", "yes", "y", "12:30", "2026-11-21", "1_000", None, None, True]


@pytest.mark.parametrize("text, size", [("2 GB", 2 * 10**9), ("500MB", 5 * 10**8), ("1.5 kb", 1500), ("7", 7), (7, 7)])
def test_sizes(text, size):
    assert load(f"resources: {{free_disk: {text}}}").config.resources.free_disk == size


def test_defaults_pass_the_same_checks():
    assert configs.Config(name="a", stages=["base"]).resources.free_disk == 2 * 10**9


def test_defaults_then_file_then_set():
    text = "name: b\ntraining:\n  sft: {batch: 16, steps: 5}\n  checkpoint:\ndata:\n"
    found = load(text, "training.sft.steps=7", "training.sft={warmup: 0.5}")
    assert (found.config.name, found.config.training.sft.batch, found.config.training.sft.steps) == ("b", 16, 7)
    origin = {key: found.origin[f"training.sft.{key}"] for key in ("batch", "steps", "warmup", "max_tokens")}
    assert origin == {"batch": "configs/a.yaml", "steps": "--set", "warmup": "--set", "max_tokens": "default"}
    assert found.origin["training.checkpoint.keep"] == found.origin["data.sources"] == "default"
    assert found.origin["stages"] == "settings.ini" and [s.name for s in found.config.stages][-1] == "sft"
    assert set(found.origin) == set(configs.flat(found.config.model_dump()))


def test_a_file_that_says_nothing_of_its_name_is_named_after_itself():
    assert load("stages: [base]").config.name == "a"


@pytest.mark.parametrize(
    "text, said",
    [
        ("training.sft.bach=3", "--set training.sft.bach=3: training.sft.bach: unknown key; did you mean training.sft"),
        ("training.sft.batch=x", '--set training.sft.batch=x: training.sft.batch: must be a whole number, not "x"'),
        ("batch=3", "did you mean training.sft.batch?"),
        ("training.sft.batch", "--set training.sft.batch: must be key=value"),
        ("=3", "--set =3: must be key=value"),
        ("training..batch=3", "must be key=value"),
        ("training.sft.batch=[3", "--set training.sft.batch=[3: "),
        ("training=3", "training: must be a section with keys of its own, not 3"),
        ("stages=[sft, base]", "--set stages=[sft, base]: stages: sft cannot come before base"),
    ],
)
def test_a_bad_set_is_named(text, said):
    assert said in complaint("name: a", text)


def test_found_from_below_and_from_elsewhere(workspace, monkeypatch):
    load("name: a")
    (workspace / "nbs" / "stages").mkdir(parents=True)
    monkeypatch.delenv("SO8T_WORKSPACE")
    monkeypatch.chdir(workspace / "nbs" / "stages")
    found = configs.load("configs/a.yaml")
    assert found.path == Path("configs/a.yaml") == configs.load(workspace / "configs/a.yaml").path
    assert configs.workspace().root == workspace.resolve()


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("[so8t]", "[other]", "neither here nor above is a settings.ini with"),
        ("runs = runs\n", "", "runs: is missing"),
        ("runs = runs", "runs = runs\nrun = x", "run: unknown key; did you mean runs?"),
        ("[DEFAULT]\n", "", "settings.ini: File contains no section headers"),
    ],
)
def test_settings_that_cannot_be_used(workspace, old, new, said):
    file = workspace / "settings.ini"
    file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(Problem) as caught:
        configs.workspace()
    assert said in str(caught.value)


def test_section_gives_plain_values():
    config = load("stages: [base, {name: sft, timeout: 60}]\ncustom: {greet: {who: [world]}}").config
    assert configs.section(config, "custom.greet") == {"who": ["world"]} == config.custom.greet
    assert configs.section(config, "stages") == ["base", {"name": "sft", "timeout": 60.0, "retries": None}]
    assert configs.section(config, "training.sft.batch") == 8
    for name, near in {"trainin.sft": "training", "training.sft.bach": "batch", "custom.gret": "greet"}.items():
        with pytest.raises(Problem, match=f"{name}: the configuration has no such key; did you mean {near}"):
            configs.section(config, name)
    with pytest.raises(Problem, match="no such key"):
        configs.section(config, "name.x")


FREE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.from_regex(r"[A-Za-z0-9_-]+", fullmatch=True), inner),
    max_leaves=8,
)
quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(text: str) -> str:
    "The text as YAML that any file can hold."
    return configs.shown(text)


@quick
@example(free="a  # b", rate=1e-3, base="日本/　x", limit=None)
@given(free=FREE, rate=st.floats(1e-12, 1), base=st.text(min_size=1), limit=st.none() | st.floats(0, 1e9))
def test_frozen_and_thawed_is_the_same(free, rate, base, limit, workspace):
    sets = [f"model.base={written('./' + base)}", f"training.sft.learning_rate={rate!r}"]
    stages = written([{"name": "base", "timeout": limit}, "mine"])
    found = load(f"stages: {stages}\ncustom: {{mine: {{free: {written(free)}}}}}", *sets)
    assert found.config.custom.mine == {"free": free} and found.config.model.base == "./" + base
    configs.freeze(found, workspace)
    assert configs.thaw(workspace) == found


@quick
@given(value=FREE)
def test_a_set_says_what_it_looks_like(value):
    assert load("name: a", f"custom.mine.free={written(value)}").config.custom.mine["free"] == value


def test_the_frozen_file_reads_well(workspace):
    configs.freeze(load("training:\n  sft: {learning_rate: 1e-5}\n", "training.seed=3"), workspace)
    lines = (workspace / "config.yaml").read_text(encoding="utf-8").splitlines()
    assert "    learning_rate: 1e-05  # configs/a.yaml" in lines and "  seed: 3  # --set" in lines
    assert 'name: "a"  # default' in lines


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("format: 1", "format: 2", "config.yaml: made by a newer so8t"),
        ("format: 1\n", "", "config.yaml: is no configuration that so8t froze"),
        ("\ntraining:\n  seed:", "\ntraining:\n  sede:", "training.sede: unknown key; did you mean training.seed?"),
        ("\ntraining:\n  seed: 0", "\ntraining:\n  seed: x", 'training.seed: must be a whole number, not "x"'),
    ],
)
def test_a_frozen_file_that_cannot_be_read(workspace, old, new, said):
    configs.freeze(load("name: a"), workspace)
    file = workspace / "config.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(Problem) as caught:
        configs.thaw(workspace)
    assert said in str(caught.value)


def test_a_run_without_configuration(workspace):
    with pytest.raises(Problem, match="config.yaml: No such file"):
        configs.thaw(workspace)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_our_own_files_are_right(file, monkeypatch):
    monkeypatch.setenv("SO8T_WORKSPACE", str(ROOT))
    assert configs.load(file).config.name == file.stem


def test_the_reference_has_every_key():
    keys = {row[0] for row in configs.schema_rows()}
    leaves = configs.flat(configs.Config(name="a", stages=["base"]).model_dump()).keys() - {"custom"}
    rows = {"stages[]": ("name", "timeout", "retries"), "training.search.over[]": configs.Span.model_fields,
            "research.agents[]": configs.Agent.model_fields, "data.sources[]": configs.Source.model_fields,
            "data.labellers[]": configs.Labeller.model_fields}
    assert keys == leaves | {f"{path}.{name}" for path, names in rows.items() for name in names}
    assert all(row[3].endswith(".") for row in configs.schema_rows())
    assert '| `data.languages` | list of en, ja, at least 1 | `["en", "ja"]` | Languages' in configs.reference()


def test_the_sources_are_those_of_the_data_room():
    from so8t.data.sources import PUBLIC

    assert set(configs.SOURCES) == {"own", "web", "research", *PUBLIC}


def test_nothing_heavy_is_imported():
    script = "import sys, so8t.flow.config; print(sorted({'torch', 'rich', 'papermill', 'IPython'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
