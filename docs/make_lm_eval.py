"""Write what lm-evaluation-harness 0.4.13 makes of a few invented items on the demo model: the golden numbers of a test.

In an environment of its own: pip install lm-eval==0.4.13 torch transformers
python docs/make_lm_eval.py src/layerlake/demo/stdlib-gpt2 tests/end_to_end/lm_eval.json
"""
# mypy: ignore-errors
# ruff: noqa: E501

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

TEMPLATES = {
    "lambada": "lambada/lambada_openai.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
}
SPLITS = {"lambada": "test", "arc_easy": "test", "hellaswag": "validation"}

# In the hub's columns, so that lm-eval's own templates read them unchanged. What could go wrong is in them: blanks
# and line ends before the last word, a word of several tokens, choices beyond ASCII, labels that are digits,
# WikiHow's markup, double blanks, an empty ctx_b, capitals.
ROWS = {
    "lambada": [
        {
            "text": "If the file cannot be opened, an exception is raised.  Return True if the object is a string, and False otherwise. "
            "If the argument is omitted or None"
        },
        {"text": "class Reader:\n    def __init__(self, name):\n        self.name ="},
        {
            "text": "def first(items):\n    for item in items:\n        return item\n    return None\n\ntry:\n    import os\nexcept"
        },
        {"text": "The baker asked the miller for flour, but all the flour had gone to the other baker"},
        {"text": 'Each line ends somewhere.\n\nThe poem had no ending \n"Why not?" asked the naïve poet'},
        {
            "text": "for key in  the  dictionary, the value is returned; if there is no such key, KeyError is raised"
        },
        {
            "text": "The default value is the same as the default value of the argument; the optional second argument is the same as the first argument."
        },
        {
            "text": "class Writer:\n    def close(self):\n        self.file.close()\n\n    def flush(self):\n        if"
            " self.file is not None"
        },
    ],
    "arc_easy": [
        {
            "question": "Which of these is a mutable sequence in Python?",
            "choices": {
                "text": ["a tuple", "a list", "a string", "an integer"],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "B",
        },
        {
            "question": "What does a kettle do to water?",
            "choices": {
                "text": [
                    "It heats it.",
                    "It freezes it.",
                    "It paints it green.",
                    "It sings about it — loudly.",
                ],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "A",
        },
        {
            "question": "How many legs has a stool with three legs?",
            "choices": {"text": ["3", "4", "12"], "label": ["1", "2", "3"]},
            "answerKey": "1",
        },
        {
            "question": "Which drink is made of roasted beans?",
            "choices": {
                "text": ["café au lait", "crème brûlée", "thé", "Gemüsebrühe mit Klößchen", "cocoa"],
                "label": ["A", "B", "C", "D", "E"],
            },
            "answerKey": "A",
        },
        {
            "question": "What is returned if the key is not in the dictionary? ",
            "choices": {
                "text": ["None", "a very long sentence about nothing in particular"],
                "label": ["A", "B"],
            },
            "answerKey": "A",
        },
        {
            "question": "Which method closes a file?",
            "choices": {"text": ["open()", "close()", "read()", "write()"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
    ],
    "hellaswag": [
        {
            "activity_label": "Computers and Electronics",
            "ctx_a": "[header] How to open a file [title] Import the module. [step] Write the import at the top of the file.",
            "ctx_b": "then you",
            "endings": [
                "call the function with the name of the file.",
                "paint the  file [substeps] with two coats of varnish. ",
                "wait for the file to come to you.",
                "give the file a good meal.",
            ],
            "label": "0",
        },
        {
            "activity_label": "Gardening",
            "ctx_a": "A woman kneels beside a bed of roses.",
            "ctx_b": "she",
            "endings": [
                "raises an exception in the greenhouse.",
                "cuts the dry stems and puts them into a basket.",
                "is a subclass of the rose.",
                "[title] swims away  from it all.",
            ],
            "label": "0",
        },
        {
            "activity_label": "Cooking",
            "ctx_a": "The pan is hot and the butter is melting.",
            "ctx_b": "",
            "endings": [
                "The cook breaks two eggs into it.",
                "The pan returns None if the butter is not a string.",
                "The cook throws the pan out of the window.",
                "Eggs.",
            ],
            "label": 0,
        },
        {
            "activity_label": "Work World",
            "ctx_a": "[header] How to write a letter [title] Begin with the date. [title] Name the person.",
            "ctx_b": "The LETTER is",
            "endings": [
                " returned as a string.",
                " sealed, stamped and posted.",
                "eaten.",
                "the default value of the optional argument of the function.",
            ],
            "label": "0",
        },
        {
            "activity_label": "Skating",
            "ctx_a": "Two   boys skate over a frozen lake.",
            "ctx_b": "One of them",
            "endings": [
                "falls and laughs.",
                "falls and gets the value of the attribute.",
                "is not defined.",
                "skates on, past the boats, the reeds and the last of the houses, until he is gone.",
            ],
            "label": "3",
        },
    ],
}


def template(task: str, rows: Path) -> dict:
    """Return lm-eval's own task, reading its items from a file."""
    path = Path(lm_eval.__file__).parent / "tasks" / TEMPLATES[task]
    lines = [line for line in path.read_text().splitlines() if "!function" not in line]
    made = yaml.safe_load("\n".join(lines))
    for name in ("tag", "training_split", "validation_split", "test_split", "dataset_name"):
        made.pop(name, None)
    made |= {
        "task": f"golden_{task}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {SPLITS[task]: str(rows)}},
    }
    made[f"{SPLITS[task]}_split"] = SPLITS[task]
    if task == "hellaswag":
        from lm_eval.tasks.hellaswag.utils import process_docs

        made["process_docs"] = process_docs
    return made


def main(model: str, out: str) -> None:
    """Score the items, and write them with their scores."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tasks = []
        for task, rows in ROWS.items():
            path = Path(folder, f"{task}.jsonl")
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            tasks.append(template(task, path))
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": model, "dtype": "float32"},
            tasks=tasks,
            batch_size=1,
            device="cpu",
            log_samples=True,
            task_manager=TaskManager(),
            bootstrap_iters=100,
        )
    for task, rows in ROWS.items():
        samples = sorted(results["samples"][f"golden_{task}"], key=lambda sample: sample["doc_id"])
        scores = results["results"][f"golden_{task}"]
        names = ("acc", "perplexity") if task == "lambada" else ("acc", "acc_norm")
        found[task] = {
            "rows": rows,
            "log_probs": [
                [round(float(reply[0]), 5) for reply in sample["filtered_resps"]] for sample in samples
            ],
            "is_greedy": [[bool(reply[1]) for reply in sample["filtered_resps"]] for sample in samples],
            **{name: [sample[name] for sample in samples] for name in names if name != "perplexity"},
            "scores": {name: scores[f"{name},none"] for name in names}
            | {f"{name}_stderr": scores[f"{name}_stderr,none"] for name in names if name != "perplexity"},
        }
    made = {
        "model": Path(model).name,
        **{name: version(name) for name in ("lm-eval", "transformers", "torch")},
    }
    Path(out).write_text(json.dumps({"made_with": made, "tasks": found}, indent=1, ensure_ascii=False) + "\n")


main(*sys.argv[1:])
