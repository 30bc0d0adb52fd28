"A model whose every word is given, behind the real server; as a program, a server that can be killed."

import json
import math
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import httpx
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from so8t.data.verdict import Verdict
from so8t.flow.config import Serve
from so8t.model.quad import Quad, render
from so8t.model.verdict import Calibration
from so8t.serve.audit import Audit
from so8t.serve.http import think_app

CALIBRATION = Calibration(1.0, 0.0, 0.0, threshold=0.5, sure=0.9, rows=0)
ALLOW, ESCALATION, DENY, REFUSE = ([0.97 if i == j else 0.01 for j in range(4)] for i in range(4))
JAM = Quad(
    "A recipe for jam.",
    "Nobody is harmed by fruit.",
    "Cooking is fine.",
    "Answer.",
    Verdict.ALLOW,
    "Boil equal weights of fruit and sugar until a drop of it sets on a cold plate.",
)


WRITTEN = (render(JAM),)


def letters() -> PreTrainedTokenizerFast:
    "A tokenizer with a token for each byte."
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made)
    wrapped.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    return wrapped


class Puppet:
    "What serve.backend.Hf is to the server: `pieces` is what it writes, `shares` how likely it finds the verdicts."

    tokenizer, context, marks = letters(), 100_000, ["<|end|>", "<|assistant|>"]

    def __init__(self, shares=ALLOW, pieces=WRITTEN, pause: float = 0):
        self.shares, self.pieces, self.pause, self.calls = shares, pieces, pause, 0

    def logprobs(self, prompt):
        return [math.log(share) for share in self.shares]

    def write(self, ids, n, told):
        text = ""
        for piece in self.pieces:
            if self.pause:
                time.sleep(self.pause)
            text += piece
            told(text)
            self.calls += 1
        return text


@contextmanager
def serving(app, **options):
    "The app on a real server; a client of it."
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", **options))
    thread = Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        yield client
    server.should_exit = True
    thread.join()


def puppet_app(backend, home: Path, token: str = "", **limits):
    return think_app(backend, CALIBRATION, Audit(home), Serve(**limits), token, digest="puppet")


def events(text: str) -> list[tuple[str, dict]]:
    "The server-sent events in a response."
    blocks = [block.split("\n", 1) for block in text.split("\n\n") if block]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in blocks]


@contextmanager
def zygote(home: Path):
    "A function that starts a server in a process of its own, and returns its pid and port."
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, __file__, home], **pipes) as process:

        def start() -> tuple[int, int]:
            process.stdin.write("\n")
            process.stdin.flush()
            pid, port = map(int, process.stdout.readline().split())
            return pid, port

        yield start


def main(home: Path):
    "For each line on stdin: a new server process on a new port; its pid and port on stdout."
    for _ in sys.stdin:
        listening = socket.create_server(("127.0.0.1", 0))
        pid = os.fork()
        if not pid:
            app = puppet_app(Puppet(pieces=list(render(JAM)), pause=0.0001), home, per_client=64)
            uvicorn.Server(uvicorn.Config(app, log_level="error")).run([listening])
            os._exit(0)
        print(pid, listening.getsockname()[1], flush=True)
        listening.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
