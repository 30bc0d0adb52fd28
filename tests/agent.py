"""A command that speaks the contract of the real agents, with faults on demand.

The real ones cannot be here: they need accounts and the network. What their documentation promises, and what this file
therefore does:

- claude (`claude -p --output-format json`): the prompt comes on stdin; stdout is one JSON object with type "result",
  `result` (the text), `is_error`, `usage` (input_tokens, cache_creation_input_tokens, cache_read_input_tokens,
  output_tokens) and `total_cost_usd`. https://code.claude.com/docs/en/headless
- codex (`codex exec --json -`): "-" reads the prompt from stdin; stdout is a line of JSON for each event: items that
  were completed, the message of the agent among them, and `turn.completed` with `usage` (input_tokens,
  cached_input_tokens, output_tokens). `--output-schema FILE` asks for JSON by that schema.
  https://developers.openai.com/codex/noninteractive
- gemini (`gemini --output-format json`): without a terminal the prompt comes on stdin; stdout is one JSON object with
  `response` and `stats`, which has `models`, each with `tokens` (prompt, candidates, thoughts, ...). Exit code 1 is an
  API error, 42 a bad input, 53 too many turns. https://geminicli.com/docs/cli/headless/

All of them: exit code 0 for an answer, another one with words on stderr where there is none.

    python agent.py FOLDER KIND [@PROMPT_FILE]

A question that ends in a request to be judged is answered with the verdict that FOLDER/verdicts.json has for it, or
ALLOW.

FOLDER/asked.jsonl gets what each call was given. FOLDER/fault names the fault; with a number behind it, it goes away
after so many calls. While there is FOLDER/pause, every call takes its time. FOLDER/kill has the number of the call that
kills who asks, and is gone then.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

WORDS = {
    "ja": ("窓口で{n}番の札を取ったが、書類を忘れた。", "役所の質問である。", "窓口の人に話してください。"),
    "en": ("I took ticket {n} but forgot my papers. What now?", "About an office.", "Tell the clerk; they will help."),
}


def row(prompt: str, number: int) -> dict:
    "An answer that is a row."
    asked, reason, told = WORDS["ja" if "Language: Japanese" in prompt else "en"]
    verdict = prompt.split("Right verdict: ")[1].split(".")[0]
    return {"prompt": asked.format(n=number), "verdict": verdict, "reason": reason, "task": "Papers forgotten.",
            "safety": "Nobody is harmed.", "policy": "Everyday help is fine.", "final": "Decide.", "answer": told,
            "sources": ["https://www.example.org/papers"]}


def judged(folder: Path, prompt: str) -> str:
    "An answer that is a verdict."
    file = folder / "verdicts.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return json.dumps({"verdict": known.get(prompt.partition("Request:\n")[2].strip(), "ALLOW")})


def wrapped(kind: str, text: str) -> str:
    "The text as that kind of agent prints it."
    used = {"input_tokens": 700, "output_tokens": 100}
    if kind == "claude":
        return json.dumps({"type": "result", "is_error": False, "result": text, "total_cost_usd": 0.01,
                           "usage": used | {"cache_read_input_tokens": 300}})
    if kind == "gemini":
        tokens = {"prompt": 700, "candidates": 60, "thoughts": 40}
        return json.dumps({"response": text, "stats": {"models": {"gemini-pro": {"tokens": tokens}}}}, indent=2)
    if kind == "codex":
        events = [{"type": "thread.started", "thread_id": "t"},
                  {"type": "item.completed", "item": {"id": "item_0", "type": "reasoning", "text": "Hm."}},
                  {"type": "item.completed", "item": {"id": "item_1", "type": "agent_message", "text": text}},
                  {"type": "turn.completed", "usage": used}]
        return "\n".join(map(json.dumps, events))
    return text


def fault(folder: Path) -> str:
    "The fault of this call."
    file = folder / "fault"
    name, _, times = (file.read_text() if file.exists() else "").partition(" ")
    if times and int(times) <= 1:
        file.unlink()
    elif times:
        file.write_text(f"{name} {int(times) - 1}")
    return name


def main(folder: Path, kind: str, source: str = ""):
    "Answer the prompt, or fail as told."
    prompt = Path(source[1:]).read_text(encoding="utf-8") if source else sys.stdin.buffer.read().decode()
    asked = folder / "asked.jsonl"
    here = {"argv": sys.argv, "prompt": prompt, "cwd": os.listdir(), "pid": os.getpid()}
    with asked.open("a", encoding="utf-8") as file:
        file.write(json.dumps(here) + "\n")
    number, wrong, kill = os.getpid(), fault(folder), folder / "kill"
    if kill.exists() and len(asked.read_text(encoding="utf-8").splitlines()) == int(kill.read_text()):
        kill.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if (folder / "pause").exists():
        time.sleep(0.3)
    if wrong == "limit":
        sys.exit(f"error 429: rate limit reached for key {os.environ.get('DEMO_API_KEY')}")
    if wrong == "sleep":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (folder / "child").write_text(str(child.pid))
        time.sleep(60)
    if "Request:\n" in prompt:
        told = "I would rather not." if wrong == "garbage" else judged(folder, prompt)
        return sys.stdout.buffer.write(wrapped(kind, told).encode())
    text = {"garbage": "I would rather not.", "half": json.dumps(row(prompt, number))[:90],
            "tags": json.dumps(row(prompt, number) | {"task": "<think-final>ALLOW"}),
            "english": json.dumps(row(prompt.replace("Japanese", "English"), number)),
            "same": json.dumps(row(prompt, 1))}.get(wrong, json.dumps(row(prompt, number), ensure_ascii=False))
    sys.stdout.buffer.write(wrapped(kind, text).encode())


if __name__ == "__main__":
    main(Path(os.path.expandvars(sys.argv[1])), *sys.argv[2:])
