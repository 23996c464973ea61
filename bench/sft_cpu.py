"""Time to the same held-out loss: glmtune against transformers' Trainer with PEFT, LoRA on the CPU, side by side.

    python bench/sft_cpu.py [FILE] [--columns prompt=question,response=answer] [--rows 240] [--dev 60] [--epochs 1]

Two processes, one per side, take turns step by step (one sleeps while the other computes), so that a busy machine slows both.
Same model, LoRA rank, starting weights, rows in the same order, learned tokens, learning rates and clipping. The peer runs at the best
settings that were found for it: bf16 weights under bf16 autocast, 4 rows x 4 micro-batches, the rows of a step grouped by length,
fused AdamW. Held-out loss is computed in fp32 by the same code for both. Writes bench/results/ when --save is given.

Prints the ratio of training time to the same held-out loss (compilation and first steps included), of tokens per second, of CPU time,
both peaks of memory, and both loss curves.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default=str(ROOT.parent / "shared" / "data" / "alpaca_en.json"))
    parser.add_argument("--columns", default=None)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--dev", type=int, default=60)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--every", type=int, default=3, help="held-out loss every n steps")
    parser.add_argument("--save", default=None, help="name of a result file in bench/results/")
    parser.add_argument("--side", choices=("glmtune", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        {"glmtune": ours, "peer": peer}[options.side](options)
    else:
        compare(options)


# --- what both sides share ---------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace):
    """The run, its plan (rows in tokens), and the dev examples; the same in every process."""
    from glmtune import plan
    from glmtune.run import load_run

    columns = dict(pair.split("=") for pair in options.columns.split(",")) if options.columns else None
    source = {"path": options.file, "max_samples": options.rows + options.dev, "columns": columns}
    settings = [
        f"model={options.model}", f"data={json.dumps([source])}", "out=(none)", "samples=[]", "too_long=cut-answer", f"max_length={options.max_length}",
        f"optim.lr={options.lr}", f"optim.batch_size={BATCH}", f"optim.epochs={options.epochs}", f"method.rank={options.rank}",
        f"method.alpha={2 * options.rank}", "optim.schedule=linear", "optim.warmup=0.06", "report_to=[]",
    ]  # fmt: skip
    made = plan.make(load_run(None, settings))
    made.dev, made.examples = made.examples[-options.dev :], made.examples[: -options.dev]
    return made


def say(**fields) -> None:
    sys.__stdout__.write(json.dumps(fields) + "\n")
    sys.__stdout__.flush()


def wait_turn() -> None:
    if not sys.stdin.readline():
        os._exit(0)


def usage() -> dict:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu": used.ru_utime + used.ru_stime, "peak_gb": used.ru_maxrss * 1024 / 1e9}


def ours(options: argparse.Namespace) -> None:
    from glmtune import methods, training

    made = prepare(options)
    settings = training.resolve(made)
    session = training._Training(made, settings, Path("(none)"), training.Screen())
    folder = Path(os.environ["BENCH_FOLDER"])
    methods.write_tensors(methods.adapter_tensors(session.model), folder / "start.safetensors")
    say(steps=settings["steps"], precision=settings["precision"], path=session.forward.path, compile=session.forward.compile)
    for step in range(settings["steps"]):
        wait_turn()
        began = time.monotonic()
        row = session._step(step, settings["steps"])
        seconds = time.monotonic() - began
        if (step + 1) % options.every == 0 or step + 1 == settings["steps"]:
            methods.write_tensors(methods.adapter_tensors(session.model), folder / f"glmtune-{step + 1}.safetensors")
        say(seconds=seconds, loss=row["loss"], tokens=row["tokens"], learned=row["learned_tokens"], **usage())


def peer(options: argparse.Namespace) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from glmtune import batch, families, training

    made = prepare(options)
    folder = Path(os.environ["BENCH_FOLDER"])
    steps = training.resolve(made)["steps"]
    bf16 = families.fast_bf16(torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.bfloat16 if bf16 else torch.float32)
    targets = sorted({name.split(".")[-1] for name in made.targets})
    model = get_peft_model(
        model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets, task_type="CAUSAL_LM")
    )
    start = load_file(folder / "start.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name.replace(".default", "")])
    order = []
    for step in range(steps):  # the rows of a step, grouped by length into its micro-batches
        rows = batch.rows_of_step(step, len(made.examples), BATCH, made.run.seed)
        order += sorted(rows, key=lambda row: -len(made.examples[row].ids))
    data = [{"input_ids": made.examples[row].ids, "labels": made.examples[row].labels} for row in order]
    pad = made.template.tokens.pad_id

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        fill = lambda key, value: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])  # noqa: E731
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
        return {"input_ids": fill("input_ids", pad), "labels": fill("labels", -100), "attention_mask": mask}

    class Ordered(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(data)

    class Turns(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *args, **kwargs):
            wait_turn()
            self.began = time.monotonic()

        def on_step_end(self, arguments, state, control, **kwargs):
            seconds, step = time.monotonic() - self.began, state.global_step
            if step % options.every == 0 or step == steps:
                tensors = {
                    n.replace(".default", ""): p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad
                }
                save_file(tensors, folder / f"peer-{step}.safetensors")
            rows = order[(step - 1) * BATCH : step * BATCH]
            tokens, learned = (sum(f(made.examples[r]) for r in rows) for f in (lambda e: len(e.ids), lambda e: e.num_learned))
            say(seconds=seconds, loss=None, tokens=tokens, learned=learned, **usage())

    arguments = TrainingArguments(
        str(folder / "peer"), per_device_train_batch_size=4, gradient_accumulation_steps=BATCH // 4, max_steps=steps, learning_rate=options.lr,
        lr_scheduler_type="linear", warmup_steps=round(0.06 * steps), weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused", bf16=bf16,
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    sys.stdout = sys.stderr
    trainer = Ordered(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[Turns()])
    say(steps=steps, precision="bf16" if bf16 else "fp32", path="Trainer + PEFT", compile=False)
    trainer.train()


# --- the comparison -------------------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> None:
    if not Path(options.file).is_file():
        sys.exit(f"{options.file} is not there; name a file of rows")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "BENCH_FOLDER": name, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        sides = {}
        for side in ("glmtune", "peer"):  # ours first: it writes the starting weights
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            sides[side] = (process, json.loads(process.stdout.readline()))
            print(f"{side}: {sides[side][1]}")
        steps = sides["glmtune"][1]["steps"]
        logs = {side: [] for side in sides}
        for step in range(steps):
            for side in ("glmtune", "peer") if step % 2 else ("peer", "glmtune"):
                process = sides[side][0]
                process.stdin.write("go\n")
                process.stdin.flush()
                logs[side].append(json.loads(process.stdout.readline()))
            a, b = logs["glmtune"][-1], logs["peer"][-1]
            assert (a["tokens"], a["learned"]) == (b["tokens"], b["learned"])
            print(
                f"step {step + 1}/{steps}: {a['seconds']:.2f} s against {b['seconds']:.2f} s for {a['tokens']} tokens", flush=True
            )
        for process, _ in sides.values():
            process.stdin.close()
            process.wait()
        held_out = {side: losses(options, folder, side) for side in sides}
    report(options, logs, held_out)


def losses(options: argparse.Namespace, folder: Path, side: str) -> dict[int, float]:
    """Held-out loss in fp32 of every adapter a side wrote."""
    import torch
    from safetensors.torch import load_file

    from glmtune import batch, families, methods
    from glmtune.forward import Forward

    made = prepare(options)
    model = families.load_model(made.folder, dtype=torch.float32)
    methods.prepare(model, torch.float32)
    methods.attach(model, made.run.method, 0)
    forward = Forward(model, "fused")
    found = {}
    for path in sorted(folder.glob(f"{side}-*.safetensors"), key=lambda p: int(p.stem.split("-")[1])):
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in methods.trainable(model).items():
                parameter.copy_(tensors[f"{methods.PREFIX}{name}.weight"])
            total = weight = 0.0
            for part in batch.cut([len(e.ids) for e in made.dev], 2048, padded=False):
                micro = batch.collate([made.dev[i] for i in part], part, made.template.tokens.pad_id, True)
                total, weight = total + float(forward.nll(micro)), weight + float(micro.weights.sum())
        found[int(path.stem.split("-")[1])] = total / weight
    return found


def time_to(loss: float, log: list[dict], curve: dict[int, float]) -> float | None:
    """Training seconds until the held-out curve first reaches `loss`, linear between its points; None if it never does."""
    clock, elapsed = {0: 0.0}, 0.0
    for step, row in enumerate(log, 1):
        elapsed += row["seconds"]
        clock[step] = elapsed
    before = (0, math.inf)
    for step, value in curve.items():
        if value <= loss:
            start = clock[before[0]] if math.isfinite(before[1]) else clock[step]
            share = (before[1] - loss) / (before[1] - value) if math.isfinite(before[1]) and before[1] > value else 1.0
            return start + share * (clock[step] - start)
        before = (step, value)
    return None


def report(options: argparse.Namespace, logs: dict, held_out: dict) -> None:
    goal = max(min(curve.values()) for curve in held_out.values())  # the best loss that both sides reach
    reached = {side: time_to(goal, logs[side], held_out[side]) for side in logs}
    total = {side: sum(row["seconds"] for row in log) for side, log in logs.items()}
    tokens = sum(row["tokens"] for row in logs["glmtune"])
    cpu = {side: log[-1]["cpu"] - log[0]["cpu"] for side, log in logs.items()}
    steady = {side: sum(row["seconds"] for row in log[2:]) or math.nan for side, log in logs.items()}
    peak = {side: log[-1]["peak_gb"] for side, log in logs.items()}
    lines = [
        f"{Path(options.file).name}: {len(logs['glmtune'])} steps of {BATCH} rows, {tokens} tokens, LoRA rank {options.rank}, lr {options.lr}",
        f"held-out loss {goal:.4f} reached after {reached['glmtune']:.1f} s (glmtune) and {reached['peer']:.1f} s (Trainer + PEFT): "
        f"ratio {reached['peer'] / reached['glmtune']:.2f}",
        f"useful tokens/s over all steps: {tokens / total['glmtune']:.0f} and {tokens / total['peer']:.0f}: ratio {total['peer'] / total['glmtune']:.2f}; "
        f"without the first two steps {steady['peer'] / steady['glmtune']:.2f}; CPU time {cpu['peer'] / cpu['glmtune']:.2f}",
        f"peak memory {peak['glmtune']:.2f} GB and {peak['peer']:.2f} GB",
        "held-out loss by step (glmtune, Trainer + PEFT): "
        + "  ".join(f"{step}: {held_out['glmtune'][step]:.4f} {held_out['peer'][step]:.4f}" for step in held_out["glmtune"]),
    ]
    print("\n".join(lines))
    if options.save:
        (ROOT / "bench" / "results").mkdir(exist_ok=True)
        (ROOT / "bench" / "results" / options.save).write_text(
            "\n".join(["$ python bench/sft_cpu.py " + " ".join(sys.argv[1:]), *lines]) + "\n"
        )


if __name__ == "__main__":
    main()
