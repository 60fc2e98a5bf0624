"""Write everything that the command line prints and writes on the embedded model, so that two versions can be compared.

    python -m tests.support.same_bytes OUT_FOLDER

Every command of `COMMANDS` runs in a process of its own, in the current folder; its output lies in a folder of its
own name in OUT_FOLDER, without what `RULES` removes. Run it once for each version, and compare by `diff -r`. For an
older version, change to its checkout, set PYTHONPATH to it, and call this file by its path. The script uses nothing of
slowllm but its command line. With names of commands behind OUT_FOLDER, it runs only those.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# What differs between two runs of one version: each pattern is replaced by what stands beside it.
RULES = {
    "times and rates of a step": (r'"(seconds|read_bytes)": [0-9.e+-]+', r'"\1": N'),
    "when a batch began": (r'"created": [0-9]+', '"created": N'),
    "ids that depend on the versions": (r'"system_fingerprint": "[^"]*"', '"system_fingerprint": "N"'),
    "the time of a step in a table": (r"[0-9.]+ s  (?=[0-9.]+ .?B read)", "N s  "),
    "progress between tokens on a terminal": (r"\x1b\[2m \[sweep [^]]*\]\x1b\[0m\x1b\[[0-9]+D\x1b\[K", ""),
    "the version that wrote a store": (r'"slowllm": "[^"]*"', '"slowllm": "N"'),
}
# On stderr, figures are times, rates and sizes of a process; where a terminal breaks a line depends on them.
STDERR_RULES = {
    "figures": (r"[0-9][0-9.,e+-]*( ?([kKMGT]i?B|B|s|min|h)\b)?", "N"),
    "line breaks": (r"\s+", " "),
}
LARGEST_TEXT_BYTES = 1 << 16

LINES = ["The compiler checks every reference.", "", "A value is returned.", "On the right is the heap."]
QUESTIONS = ["Is the value returned?", "Does the heap hold memory?"]
SCORED: list[dict[str, Any]] = [
    {"id": "a", "context": "The value is", "choices": [" returned", " the heap", " memory"]},
    {"text": "The compiler checks every reference."},
    {"context": "The value", "continuation": " is returned."},
    {"context": "", "choices": ["The", "A value"]},
    {"choices": []},
]
BOOLQ = [
    {"question": "is the value returned", "passage": "The value is returned.", "answer": True},
    {"question": "is the heap cold", "passage": "The heap holds memory on the right.", "answer": False},
    {
        "question": "does the compiler check",
        "passage": "The compiler checks every reference.",
        "answer": True,
    },
]
TEMPLATES = """\
dataset: mine
templates:
  a: !Template
    answer_choices: no ||| yes
    id: a
    jinja: "{{ passage }} {{ question }}? ||| {% if answer %}yes{% else %}no{% endif %}"
    metadata: !TemplateMetadata {}
    name: plain
    reference: ''
"""
EXAMPLES = [
    {"prompt": "The value is", "answer": " returned."},
    {"prompt": "The heap holds", "answer": " memory."},
    {"text": "The compiler checks every reference."},
]
REQUESTS = [
    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "The value", "max_tokens": 3}},
    {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions",
     "body": {"messages": [{"role": "user", "content": "What is a heap?"}], "max_tokens": 3, "temperature": 0}},
    {"custom_id": "c", "method": "POST", "url": "/v1/nothing", "body": {}},
]  # fmt: skip

# In a command, {in} is the folder of the input files, {out} that of its output and {all} the one that holds both. Each
# names its dtype: what "auto" measures on a busy machine may change between two runs.
FORWARD = "forward {in}/lines.txt --ram 4GiB"
GENERATE = "generate --prompts {in}/lines.txt --ram 4GiB --max-new-tokens 6 --json --log-probs 2"
EVALUATE = "--ram 4GiB --dtype fp32 --out {out}/predictions.jsonl"
TUNE = (
    "tune {in}/examples.jsonl --out {out}/prompt --ram 4GiB --dtype fp32 --tokens 4 --steps 3 --batch-size 2"
)
CONVERT = "convert weights/tiny-bloom {out}/store --workers 1 --store"
COMMANDS = {
    "forward_table": f"{FORWARD} --dtype fp32",
    "forward_table_tokens": f"{FORWARD} --per-token --no-prefix --dtype bf16",
    "forward_json": f"{FORWARD} --json --per-token --dtype fp32",
    "forward_bf16": f"{FORWARD} --json --per-token --dtype bf16",
    "forward_out": f"{FORWARD} --out {{out}}/lines.jsonl --dtype fp32 --max-tokens 5 --truncate",
    "forward_stream_all": f"{FORWARD} --json --per-token --dtype fp32 --stream-all",
    "forward_other_model": f"{FORWARD} --json --model weights/tiny-bloom-draft --dtype fp32",
    "forward_refused": f"{FORWARD} --max-tokens 5",
    "score": "score {in}/scored.jsonl --ram 4GiB --dtype fp32 --per-token",
    "score_bf16": "score {in}/scored.jsonl --ram 4GiB --dtype bf16 --normalize unconditional",
    "yesno": "yesno {in}/questions.txt --ram 4GiB --dtype fp32",
    "yesno_table": "yesno {in}/questions.txt --ram 4GiB --dtype bf16",
    "generate": f"{GENERATE} --dtype fp32",
    "generate_bf16": f"{GENERATE} --dtype bf16 --stream-all",
    "generate_beams": f"{GENERATE} --dtype fp32 --beams 3 --num-sequences 2",
    "generate_sample": f"{GENERATE} --dtype fp32 --sample --seed 3 --top-p 0.9 --num-sequences 2",
    "generate_lookup": f"{GENERATE} --dtype fp32 --draft lookup",
    "generate_draft": f"{GENERATE} --dtype fp32 --draft weights/tiny-bloom-draft",
    "generate_texts": "generate The A --ram 4GiB --dtype fp32",
    "generate_shown": "generate The --ram 4GiB --dtype fp32",
    "eval_boolq": f"eval boolq --data {{in}}/boolq.jsonl {EVALUATE}",
    "eval_boolq_table": f"eval boolq --data {{in}}/boolq.jsonl --template-file {{in}}/t.yaml {EVALUATE}",
    "eval_task": f"eval task --data {{in}}/boolq.jsonl --template-file {{in}}/t.yaml {EVALUATE}",
    "tune": TUNE,
    "tune_deep": f"{TUNE} --kind deep --top 2 --validation {{in}}/examples.jsonl --eval-every 1 --lr 0.1 --lr 0.01",
    "tune_table": f"{TUNE} --kind prefix --stream-all",
    "batch": "batch {in}/requests.jsonl --ram 4GiB --dtype fp32",
    "batch_bf16": "batch {in}/requests.jsonl --ram 4GiB --dtype bf16 --out {out}/answers.jsonl",
    "convert_lossless": f"{CONVERT} lossless",
    "convert_int8": f"{CONVERT} int8",
    "convert_int4": f"{CONVERT} int4",
    "convert_bf16": f"{CONVERT} bf16",
    "verify_lossless": "verify {all}/convert_lossless/store",
    "verify_int8": "verify {all}/convert_int8/store --json",
    "forward_lossless": f"{FORWARD} --json --model {{all}}/convert_lossless/store --dtype bf16",
    "forward_int8": f"{FORWARD} --json --model {{all}}/convert_int8/store --dtype bf16",
    "forward_int4": f"{FORWARD} --json --model {{all}}/convert_int4/store --dtype fp32",
}  # fmt: skip
# These write to a terminal, where tables are.
ON_TERMINAL = {
    "forward_table", "forward_table_tokens", "yesno_table", "generate_texts", "generate_shown", "eval_boolq_table",
    "tune_table",
}  # fmt: skip


def write_inputs(folder: Path) -> None:
    """Write the files that the commands read."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in {"lines.txt": LINES, "questions.txt": QUESTIONS}.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    tables = {"scored": SCORED, "boolq": BOOLQ, "examples": EXAMPLES, "requests": REQUESTS}
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "t.yaml").write_text(TEMPLATES)


def run(arguments: list[str], *, on_terminal: bool) -> tuple[int, str, str]:
    """Run the command line; return its exit code, stdout and stderr."""
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "TERM": "xterm", "MKL_CBWR": "COMPATIBLE",
    }  # fmt: skip
    command = [sys.executable, "-m", "slowllm", *arguments]
    with tempfile.TemporaryFile() as errors:
        if not on_terminal:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, check=False
            )  # fmt: skip
            code, output = done.returncode, done.stdout
        else:
            ours, theirs = pty.openpty()
            started = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=errors
            )
            os.close(theirs)
            output = b""
            with contextlib.suppress(OSError):  # which is how a terminal ends
                while part := os.read(ours, 4096):
                    output += part
            os.close(ours)
            code = started.wait()
        errors.seek(0)
        return code, output.decode(), errors.read().decode()


def clean(text: str, folder: Path, rules: dict[str, tuple[str, str]]) -> str:
    """Return a text without the paths of this run and without what the rules remove."""
    text = text.replace(str(folder), "OUT").replace(os.getcwd(), "HERE")
    for pattern, replacement in rules.values():
        text = re.sub(pattern, replacement, text)
    return text


def keep(path: Path, folder: Path) -> None:
    """Leave a file's text without what `RULES` removes; of what is large or no text, leave only the hash."""
    content = path.read_bytes()
    try:
        text = None if len(content) > LARGEST_TEXT_BYTES else content.decode()
    except UnicodeDecodeError:
        text = None
    if text is None:
        path.unlink()
        path.with_name(path.name + ".sha256").write_text(
            f"{hashlib.sha256(content).hexdigest()} {len(content)} bytes\n"
        )
    else:
        path.write_text(clean(text, folder, RULES))


def main() -> None:
    """Run the commands, and leave what they printed and wrote."""
    folder = Path(sys.argv[1]).resolve()
    names = sys.argv[2:] or list(COMMANDS)
    write_inputs(folder / "in")
    for name in names:
        out = folder / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        arguments = [
            word.format(**{"in": folder / "in", "out": out, "all": folder}) for word in COMMANDS[name].split()
        ]
        code, output, errors = run(arguments, on_terminal=name in ON_TERMINAL)
        print(f"{name}: exit code {code}", file=sys.stderr)
        (out / "exit_code").write_text(f"{code}\n")
        (out / "stdout").write_text(output)
        (out / "stderr").write_text(clean(errors, folder, STDERR_RULES))
    for name in names:  # at the end, because later commands read the stores
        for path in (folder / name).rglob("*"):
            if path.name.startswith("events.out.tfevents"):  # its name is a time, and so is what is in it
                path.unlink()
            elif path.is_file():
                keep(path, folder)


if __name__ == "__main__":
    main()
