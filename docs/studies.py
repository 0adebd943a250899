"""The studies of docs/results.md: runs, scores, tables and figures, one command for each.

    python docs/studies.py 1                # methods on the demo
    python docs/studies.py 2                # when the online module helps
    python docs/studies.py 4 --teacher T --student S --data train.jsonl --test test.jsonl
    python docs/studies.py figures          # tables and figures again, from the files of the runs

A run is one process of okd.py in runs/studyN/GROUP/NAME-sSEED, in one thread. Runs that have ended
are skipped and interrupted ones are resumed, so that a command can be repeated, also with more
seeds. Tables go into docs/results.md, between their markers; figures lie beside it.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from matplotlib.figure import Figure

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent
RUNS = ROOT / "runs"

METHODS = {
    "1": [
        ("sft", "--method sft"),
        ("fkl", "--method fkl"),
        ("fkl-temperature-2", "--method fkl --temperature 2"),
        ("rkl", "--method rkl"),
        ("jsd", "--method jsd"),
        ("okd", "--method okd"),
        ("okd-anchor-.3", "--method okd --anchor .3"),
        ("okd-anchor-1", "--method okd --anchor 1"),
        ("okd-alpha-0", "--method okd --alpha 0"),
        ("okd-top-layer", "--method okd --lora-top-layers 1"),
        ("gkd", "--method gkd"),
        ("opd", "--method opd"),
    ],
    "2": [
        ("fkl", "--method fkl"),
        ("okd", "--method okd"),
        ("okd-anchor-1", "--method okd --anchor 1"),
    ],
    "4": [  # the longest run first
        ("okd", "--method okd"),
        ("fkl", "--method fkl --cache-teacher"),
        ("sft", "--method sft"),
    ],
}

# Of study 2: what the teacher is fine-tuned on. The epochs on other rows than the demo's 400 make
# for nearly the same number of optimizer steps.
SETTINGS = [
    ("400-rows-0-epochs", "--teacher-sft-epochs 0"),
    ("400-rows-10-epochs", "--teacher-sft-epochs 10"),
    ("400-rows-40-epochs", "--teacher-sft-epochs 40"),
    ("1000-rows", "--data runs/rows-1000.jsonl --student-sft-epochs 28 --epochs 16"),
    ("4000-rows", "--data runs/rows-4000.jsonl --student-sft-epochs 7 --epochs 4"),
]

REAL_TEXT = (
    "--max-length 160 --max-prompt-length 120 --max-new-tokens 64 --precision bf16 "
    "--teacher-sft full --teacher-sft-epochs 6 --teacher-sft-lr 2e-4 "
    "--student-sft-epochs 2 --student-sft-lr 2e-4 --batch-size 8 --lr 1e-4 --max-steps 400 "
)

# The student at the end is measured, not the best one on the way.
COMMON = "--select last --score-rows 0 --eval-every 50 --eval-rows 200"
SEEDS = {"1": 5, "2": 3, "4": 2}


def write_rows():
    """Larger transfer sets than the demo's, without any of its prompts: 5 % dev, 5 % test."""
    sys.path.insert(0, str(ROOT))
    import okd

    known = {row["prompt"] for row in okd.demo_rows(5800, seed=0)}
    rows = [row for row in okd.demo_rows(6000, seed=1) if row["prompt"] not in known]
    random.Random(0).shuffle(rows)
    RUNS.mkdir(exist_ok=True)
    for count in (1000, 4000):
        lines = [json.dumps(row) + "\n" for row in rows[: round(count / 0.9)]]
        (RUNS / f"rows-{count}.jsonl").write_text("".join(lines))


# Running ------------------------------------------------------------------------------------------


def ended(folder):
    return (folder / "student").exists()


def start(*command):
    """One process of a program of this repository, in one thread; its output if it fails."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    program = [sys.executable, *command]
    process = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(process.returncode, *command, flush=True)
    if process.returncode:
        print(process.stdout[-1000:], process.stderr[-1000:], flush=True)


def train_and_score(folder, flags, protocol):
    if (folder / "args.json").exists():
        flags = f"--resume {folder}"
    if not ended(folder):
        start("okd.py", *flags.split())
    if ended(folder) and not (folder / "results.json").exists():
        start("eval.py", str(folder), *protocol)


def run_study(study, groups, protocol, seeds, jobs):
    """Seed by seed all methods of all groups; then each group's comparison with fkl."""
    folders = []
    flags = []
    for seed in range(1, seeds + 1):
        for name, method in METHODS[study]:
            for group, setting in groups:
                folder = RUNS / f"study{study}" / group / f"{name}-s{seed}"
                folders.append(folder)
                flags.append(f"{setting} {method} {COMMON} --seed {seed} --output-dir {folder}")
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train_and_score, folders, flags, itertools.repeat(protocol)))
    for group, _ in groups:
        folder = RUNS / f"study{study}" / group
        runs = [str(run) for run in sorted(folder.glob("*-s*")) if ended(run)]
        label = json.loads((folder / "fkl-s1" / "args.json").read_text())["label"]
        options = ["--compare", "--baseline", label, "--output-dir", str(folder / "comparison")]
        start("eval.py", *runs, *protocol, *options)


# Reading ------------------------------------------------------------------------------------------


def read_run(folder):
    """What tables and figures need of a run that has ended and was scored."""
    run = json.loads((folder / "args.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    distil = [record for record in records if record["phase"] == "distil"]
    run["evals"] = [record for record in distil if "dev/student_ce" in record]
    run["teacher_ce_start"] = run["evals"][0]["dev/teacher_ce"]
    run.update(run["evals"][-1])
    run.update(records[-1])
    result = json.loads((folder / "results.json").read_text())[0]  # of the study's protocol
    run["rouge_l"] = result["rouge_l"]
    lines = (folder / "generations" / result["generations"][0]).read_text().splitlines()
    run["answers"] = {answer["row"]: answer for answer in map(json.loads, lines)}
    return run


def read_group(study, group):
    """({name: {seed: run}} in the study's order, {name: its entry in eval.py's comparison})"""
    folder = RUNS / f"study{study}" / group
    comparison = json.loads((folder / "comparison" / "comparison.json").read_text())
    by_label = {entry["method"]: entry for entry in comparison}
    runs = {}
    entries = {}
    for name, _ in METHODS[study]:
        for path in sorted(folder.glob(f"{name}-s*")):
            if ended(path):
                run = read_run(path)
                runs.setdefault(name, {})[run["seed"]] = run
                entries[name] = by_label[run["label"]]
    return runs, entries


# Tables -------------------------------------------------------------------------------------------

HEADER = (
    "| run | seeds | Rouge-L | minus fkl's (95 %) | dev CE | KL(p_0‖q) | KL(q‖p_0) | top-1 | "
    "teacher's dev CE: start | end |\n" + "|---" * 10 + "|"
)
DIGITS = {
    "dev/student_ce": 3,
    "dev/fkl": 3,
    "dev/rkl": 3,
    "dev/top1_agreement": 3,
    "teacher_ce_start": 3,
    "dev/teacher_ce": 3,
}


def spread(runs, key, digits):
    """Mean ± standard deviation over seeds."""
    values = [run[key] for run in runs.values()]
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def table_rows(runs, entries, prefix=""):
    rows = []
    for name, by_seed in runs.items():
        cells = [prefix + name, str(len(by_seed)), spread(by_seed, "rouge_l", 1)]
        cells.append(entries[name]["verdict"].removesuffix(", not distinguishable"))
        cells += [spread(by_seed, key, digits) for key, digits in DIGITS.items()]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def answers(runs, count=5):
    """The first test rows with the answers of each method."""
    lines = []
    for number in range(count):
        prompt = runs["fkl"][1]["answers"][number]["prompt"]
        question = prompt.partition("### Instruction:")[2].partition("### Response:")[0]
        lines.append(f"\n**{' '.join(question.split())}**\n")
        for name, by_seed in runs.items():
            output = by_seed[1]["answers"][number]["output"]
            lines.append(f"- {name}: {' '.join(output.split())}")
    return lines


def row_interval(ours, theirs):
    """Mean difference of two runs in Rouge-L and its 95 % interval over the rows, as text."""
    differences = [
        ours["answers"][row]["score"] - theirs["answers"][row]["score"] for row in ours["answers"]
    ]
    mean = statistics.fmean(differences)
    half = 1.96 * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def insert(marker, lines):
    """Puts lines into docs/results.md, between a marker and the next end."""
    path = DOCS / "results.md"
    begin = f"<!-- {marker} -->"
    before, rest = path.read_text().split(begin)
    after = rest.partition("<!-- end -->")[2]
    text = "\n".join(lines)
    path.write_text(f"{before}{begin}\n\n{text}\n\n<!-- end -->{after}")


# Figures ------------------------------------------------------------------------------------------

CURVES = [
    ("sft", "dev/student_ce", "grey", "-", "student, sft"),
    ("fkl", "dev/student_ce", "C0", "-", "student, fkl: frozen teacher"),
    ("okd", "dev/student_ce", "C3", "-", "student, okd"),
    ("fkl", "dev/teacher_ce", "C0", "--", "teacher, frozen"),
    ("okd", "dev/teacher_ce", "C3", "--", "teacher with okd's module"),
]


def draw_curves(axis, runs):
    """Dev CE against the step, mean over seeds: students, and the teacher as okd moves it."""
    for name, key, color, style, label in CURVES:
        evals = [run["evals"] for run in runs[name].values()]
        steps = [record["step"] for record in evals[0]]
        means = []
        for records in zip(*evals, strict=True):
            means.append(statistics.fmean(record[key] for record in records))
        axis.plot(steps, means, style, color=color, label=label, marker="o", markersize=3)
    axis.set(xlabel="step", ylabel="cross-entropy on dev rows, nats (lower is better)")
    axis.set(title="Student and teacher during training")
    axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def draw_differences(axis, entries):
    """Differences to fkl in Rouge-L, with their 95 % intervals."""
    compared = {name: entry for name, entry in entries.items() if entry.get("interval")}
    for place, (name, entry) in enumerate(compared.items()):
        color = "C3" if name.startswith("okd") else "grey"
        axis.plot(entry["interval"], [place, place], color=color)
        axis.plot(entry["difference"], place, "o", color=color)
    axis.axvline(0, color="C0")
    axis.set_yticks(range(len(compared)), compared)
    axis.invert_yaxis()
    axis.set(xlabel="test Rouge-L minus fkl's, 95 % intervals (right is better)")
    axis.set(title="Answers to test rows, against fkl")


def report_1():
    runs, entries = read_group("1", "demo")
    insert("study 1", [HEADER, *table_rows(runs, entries)])
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, runs)
    draw_differences(right, entries)
    figure.savefig(DOCS / "okd.png", dpi=120)


def report_2():
    """Does the change in the teacher's dev CE tell whether the module helps the student?"""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = [HEADER]
    changes = []
    gains = {"dev CE": [], "Rouge-L": []}
    for number, (setting, _) in enumerate(SETTINGS):
        if not (RUNS / "study2" / setting / "comparison").exists():
            continue
        runs, entries = read_group("2", setting)
        lines += table_rows(runs, entries, f"{setting}: ")
        for name, marker in (("okd", "o"), ("okd-anchor-1", "^")):
            label = f"{setting}, {name}"
            for seed in runs[name].keys() & runs["fkl"].keys():
                run = runs[name][seed]
                fkl = runs["fkl"][seed]
                change = run["dev/teacher_ce"] - run["teacher_ce_start"]
                ce_gain = fkl["dev/student_ce"] - run["dev/student_ce"]
                rouge_gain = run["rouge_l"] - fkl["rouge_l"]
                left.plot(change, ce_gain, marker, color=f"C{number}", label=label)
                right.plot(change, rouge_gain, marker, color=f"C{number}")
                label = None
                changes.append(change)
                gains["dev CE"].append(ce_gain)
                gains["Rouge-L"].append(rouge_gain)
    for axis, metric in ((left, "dev CE, nats"), (right, "test Rouge-L")):
        axis.axhline(0, color="grey")
        axis.axvline(0, color="grey")
        axis.set(xlabel="change in the teacher's dev CE, nats (left: the module made it better)")
        axis.set(ylabel=f"gain over fkl in {metric} (up: okd is better)")
    figure.legend(loc="outside lower center", ncols=5, fontsize=7)
    figure.savefig(DOCS / "when-it-helps.png", dpi=120)
    lines.append("")
    for metric, values in gains.items():
        better = [gain > 0 for gain, change in zip(values, changes, strict=True) if change < 0]
        worse = [gain > 0 for gain, change in zip(values, changes, strict=True) if change >= 0]
        lines.append(
            f"- {metric}: better than fkl in {sum(better)} of {len(better)} runs whose teacher "
            f"became better on the dev rows, and in {sum(worse)} of {len(worse)} of the others."
        )
    insert("study 2", lines)


def report_4():
    runs, entries = read_group("4", "dolly")
    lines = [HEADER, *table_rows(runs, entries), ""]
    for name in ("okd", "sft"):
        for seed, run in runs[name].items():
            interval = row_interval(run, runs["fkl"][seed])
            title = f"Rouge-L of {name} minus fkl's, seed {seed}, 95 % over rows"
            lines.append(f"- {title}: {interval}.")
    insert("study 4", lines)
    insert("answers", answers(runs))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    draw_curves(figure.subplots(), runs)
    figure.savefig(DOCS / "real-text.png", dpi=120)


REPORTS = {"1": report_1, "2": report_2, "4": report_4}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", choices=["1", "2", "4", "figures"])
    parser.add_argument("--seeds", type=int, help="default: 5, 3 and 2 in studies 1, 2 and 4")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, a core each")
    for flag in ("--teacher", "--student", "--data", "--test"):
        help_text = "study 4: absolute path of a folder, or of a file of JSON lines"
        parser.add_argument(flag, help=help_text)
    args = parser.parse_args()
    if args.study == "figures":
        for study, report in REPORTS.items():
            if (RUNS / f"study{study}").exists():
                report()
        return
    groups = [("demo", "")]
    protocol = "--data demo --greedy --max-new-tokens 48 --precision fp32"
    if args.study == "2":
        write_rows()
        groups = SETTINGS
    if args.study == "4":
        if None in (args.teacher, args.student, args.data, args.test):
            parser.error("study 4 needs --teacher, --student, --data and --test")
        models = f"--teacher {args.teacher} --student {args.student} --data {args.data}"
        groups = [("dolly", f"{models} {REAL_TEXT}")]
        protocol = f"--data {args.test} --greedy --max-new-tokens 64 --precision bf16"
    seeds = args.seeds or SEEDS[args.study]
    run_study(args.study, groups, protocol.split(), seeds, args.jobs)
    REPORTS[args.study]()


if __name__ == "__main__":
    main()
