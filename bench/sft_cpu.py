"""Time to the same held-out loss: glmtune against transformers' Trainer with PEFT, LoRA on the CPU, side by side.

    python bench/sft_cpu.py [FILE] [--rows 240] [--dev 60] [--epochs 1] [--precision fp32] [--save NAME] [--small]

Two processes, one per side, take turns step by step (one sleeps while the other computes), so that a busy machine slows both.
Same model, LoRA rank, starting weights, rows in the same order, learned tokens and clipping. The learning rate of each step is computed
here and sent to both sides with their turn: transformers' own warm-up starts at 0, ours does not. The peer runs at the best settings that
were found for it: bf16 weights under bf16 autocast, 4 rows x 4 micro-batches, the rows of a step grouped by length, fused AdamW.
Held-out loss is computed in fp32 by the same code for both.

Prints the ratio of training time to the same held-out loss (compilation and first steps included), of tokens per second, of CPU time,
both peaks of memory, both loss curves and their largest difference. In fp32 both sides compute the same function, so their curves must lie
on each other (within TOLERANCE): if they do not, the comparison is not one of speed, and the script fails.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _common as common

BATCH = 16
WARMUP = 0.06  # share of the steps, then linear decay
TOLERANCE = 1e-3  # of held-out losses, both sides in fp32


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("file", nargs="?", default=str(common.ROOT.parent / "shared" / "data" / "alpaca_en.json"))
    parser.add_argument("--model", default=common.MODEL)
    parser.add_argument("--rows", type=int, default=240, help=f"a multiple of {BATCH}")
    parser.add_argument("--dev", type=int, default=60)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="of both sides")
    parser.add_argument("--every", type=int, default=3, help="held-out loss every n steps")
    options = common.parse(parser)
    if options.part:
        {"glmtune": ours, "peer": peer}[options.part](options)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        if options.small:
            options.model, options.file = common.tiny_inputs(Path(folder), 2 * BATCH + 8)
            options.rows, options.dev, options.epochs, options.every, options.precision = 2 * BATCH, 8, 3, 1, "fp32"
        if not Path(options.file).is_file():
            sys.exit(f"{options.file} is not there; name a file of rows")
        compare(options)


# --- what both sides share ---------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace):
    """The run's plan: rows in tokens, those for training and held-out ones; and its settings. The same in every process."""
    from glmtune import plan
    from glmtune import settings as decided
    from glmtune.run import load_run
    from glmtune.store import Chosen

    source = {"path": options.file, "max_samples": options.rows + options.dev}
    settings = [
        f"model={options.model}", f"data={json.dumps([source])}", "out=(none)", "samples=[]", "too_long=cut-answer", f"max_length={options.max_length}",
        f"optim.batch_size={BATCH}", f"optim.epochs={options.epochs}", f"method.rank={options.rank}", f"method.alpha={2 * options.rank}",
        "optim.schedule=constant", "optim.warmup=0", f"precision={options.precision}", "device=cpu", "report_to=[]",
    ]  # fmt: skip
    made = plan.make(load_run(None, settings))
    store, index = made.examples.store, made.examples.index
    made.examples, made.dev = Chosen(store, index[: -options.dev]), Chosen(store, index[-options.dev :])
    if len(made.examples) % BATCH:
        sys.exit(f"{len(made.examples)} rows to train on; wanted a multiple of {BATCH}, so that both sides see the same steps")
    return made, decided.resolve(made)


def say(**fields) -> None:
    print(json.dumps(fields), file=sys.__stdout__, flush=True)


def wait_turn() -> float:
    """Sleeps until it is this side's turn; the learning rate of its step."""
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    return float(line)


def usage() -> dict:
    return {"cpu": common.cpu_seconds(), "peak_gb": common.peak_gb()}


def ours(options: argparse.Namespace) -> None:
    from glmtune import methods
    from glmtune.loop import Loop
    from glmtune.progress import Screen
    from glmtune.session import Session

    made, settings = prepare(options)
    loop = Loop(Session(made, settings, Path("(none)"), Screen()))
    folder = Path(options.folder)
    methods.write_tensors(methods.adapter_tensors(loop.session.model), folder / "start.safetensors")
    say(
        steps=settings["steps"],
        precision=settings["precision"],
        path=loop.session.forward.path,
        compile=loop.session.forward.compile,
    )
    for step in range(settings["steps"]):
        loop.session.settings["lr"] = wait_turn()  # the schedule is constant, so this is the rate of the step
        began = time.monotonic()
        row = loop.step(step, settings["steps"])
        seconds = time.monotonic() - began
        if (step + 1) % options.every == 0 or step + 1 == settings["steps"]:
            methods.write_tensors(methods.adapter_tensors(loop.session.model), folder / f"glmtune-{step + 1}.safetensors")
        say(seconds=seconds, lr=row["lr"], tokens=row["tokens"], learned=row["learned_tokens"], **usage())


def peer(options: argparse.Namespace) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from glmtune import batch

    made, settings = prepare(options)
    folder, steps, bf16 = Path(options.folder), settings["steps"], settings["precision"] == "bf16"
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.bfloat16 if bf16 else torch.float32)
    targets = sorted({name.split(".")[-1] for name in made.method.targets})
    model = get_peft_model(
        model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets, task_type="CAUSAL_LM")
    )
    wait_turn()  # until the other side has written its start
    start = load_file(folder / "start.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name.replace(".default", "")])
    order = []
    for step in range(steps):  # the rows of a step, grouped by length into its micro-batches
        rows = batch.rows_of_step(step, len(made.examples), BATCH, made.run.seed)
        order += sorted(rows, key=lambda row: -made.lengths[row])
    examples = [made.examples[row] for row in order]
    data = [{"input_ids": example.ids, "labels": example.labels} for example in examples]
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
        began = rate = used = 0.0

        def on_step_begin(self, *args, optimizer, **kwargs):
            self.rate = wait_turn()
            for group in optimizer.param_groups:
                group["lr"] = self.rate
            self.began = time.monotonic()

        def on_optimizer_step(self, *args, optimizer, **kwargs):
            (self.used,) = {group["lr"] for group in optimizer.param_groups}

        def on_step_end(self, arguments, state, control, **kwargs):
            seconds, step = time.monotonic() - self.began, state.global_step
            if step % options.every == 0 or step == steps:
                tensors = {
                    n.replace(".default", ""): p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad
                }
                save_file(tensors, folder / f"peer-{step}.safetensors")
            seen = examples[(step - 1) * BATCH : step * BATCH]
            tokens, learned = sum(len(e.ids) for e in seen), sum(e.num_learned for e in seen)
            say(seconds=seconds, lr=self.used, tokens=tokens, learned=learned, **usage())

    arguments = TrainingArguments(
        str(folder / "peer"), per_device_train_batch_size=4, gradient_accumulation_steps=BATCH // 4, max_steps=steps, learning_rate=options.lr,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused", bf16=bf16,
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    sys.stdout = sys.stderr
    trainer = Ordered(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[Turns()])
    say(steps=steps, precision=settings["precision"], path="Trainer + PEFT", compile=False)
    trainer.train()


# --- the comparison -------------------------------------------------------------------------------------------------------------


class Side:
    """The process of one side, as the comparison talks to it."""

    def __init__(self, options: argparse.Namespace, name: str):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.name, self.log = name, []
        self.process = subprocess.Popen(
            common.command(options, name), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def send(self, rate: float) -> None:
        print(rate, file=self.process.stdin, flush=True)

    def receive(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit(f"{self.name} ended early, exit {self.process.wait()}")

    def end(self) -> None:
        self.process.communicate()


def compare(options: argparse.Namespace) -> None:
    from glmtune.settings import learning_rate

    ours, peer = Side(options, "glmtune"), Side(options, "peer")
    try:
        about = ours.receive()  # by now it has written its starting weights
        peer.send(0.0)
        print(f"glmtune: {about}\npeer: {peer.receive()}")
        steps = about["steps"]
        for step in range(steps):
            rate = learning_rate(step, steps, options.lr, "linear", WARMUP)
            for side in (ours, peer) if step % 2 else (peer, ours):
                side.send(rate)
                side.log.append(side.receive())
            a, b = ours.log[-1], peer.log[-1]
            assert (a["tokens"], a["learned"], a["lr"]) == (b["tokens"], b["learned"], b["lr"]), (step, a, b)
            assert a["lr"] == rate, (step, a["lr"], rate)
            print(
                f"step {step + 1}/{steps}: {a['seconds']:.2f} s against {b['seconds']:.2f} s for {a['tokens']} tokens", flush=True
            )
    finally:
        ours.end()
        peer.end()
    logs = {side.name: side.log for side in (ours, peer)}
    report(options, about["precision"], logs, held_out(options, list(logs)))


def held_out(options: argparse.Namespace, sides: list[str]) -> dict[str, dict[int, float]]:
    """Held-out loss in fp32 of every adapter the sides wrote, by step."""
    import torch
    from safetensors.torch import load_file

    from glmtune import methods
    from glmtune.loop import Loop
    from glmtune.progress import Screen
    from glmtune.session import Session

    made, settings = prepare(options)
    loop = Loop(Session(made, settings | {"precision": "fp32", "compile": False}, Path("(none)"), Screen()))

    def loss(path: Path) -> float:
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in loop.session.parameters.items():
                parameter.copy_(tensors[f"{methods.PREFIX}{name}.weight"])
        return loop.evaluate()["eval_loss"]

    found = {
        side: {int(path.stem.split("-")[1]): path for path in Path(options.folder).glob(f"{side}-*.safetensors")} for side in sides
    }
    return {side: {step: loss(paths[step]) for step in sorted(paths)} for side, paths in found.items()}


def time_to(loss: float, log: list[dict], curve: dict[int, float]) -> float:
    """Training seconds until the held-out curve first reaches `loss`, linear between its points."""
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
    return math.nan


def report(options: argparse.Namespace, precision: str, logs: dict, curves: dict) -> None:
    goal = max(min(curve.values()) for curve in curves.values())  # the best loss that both sides reach
    reached = {side: time_to(goal, logs[side], curves[side]) for side in logs}
    total = {side: sum(row["seconds"] for row in log) for side, log in logs.items()}
    tokens = sum(row["tokens"] for row in logs["glmtune"])
    cpu = {side: log[-1]["cpu"] - log[0]["cpu"] for side, log in logs.items()}
    steady = {side: sum(row["seconds"] for row in log[2:]) or math.nan for side, log in logs.items()}
    peak = {side: log[-1]["peak_gb"] for side, log in logs.items()}
    apart = max(abs(curves["glmtune"][step] - curves["peer"][step]) for step in curves["glmtune"])
    say = common.saying(options)
    say(common.told(options.file, rows=options.rows, dev=options.dev, epochs=options.epochs, precision=precision))
    say(
        f"{len(logs['glmtune'])} steps of {BATCH} rows, {tokens} tokens, LoRA rank {options.rank}, {precision}, lr {options.lr} with linear warm-up "
        f"{WARMUP} and decay, the same of every step on both sides"
    )
    say(
        f"held-out loss {goal:.4f} reached after {reached['glmtune']:.1f} s (glmtune) and {reached['peer']:.1f} s (Trainer + PEFT): "
        f"ratio {reached['peer'] / reached['glmtune']:.2f}"
    )
    say(
        f"useful tokens/s over all steps: {tokens / total['glmtune']:.0f} and {tokens / total['peer']:.0f}: ratio {total['peer'] / total['glmtune']:.2f}; "
        f"without the first two steps {steady['peer'] / steady['glmtune']:.2f}; CPU time {cpu['peer'] / cpu['glmtune']:.2f}"
    )
    say(f"peak memory {peak['glmtune']:.2f} GB and {peak['peer']:.2f} GB")
    say(
        "held-out loss by step (glmtune, Trainer + PEFT): "
        + "  ".join(f"{step}: {curves['glmtune'][step]:.4f} {curves['peer'][step]:.4f}" for step in curves["glmtune"])
    )
    say(f"largest difference of the two curves: {apart:.2g}" + (f" (at most {TOLERANCE:g} in fp32)" if precision == "fp32" else ""))
    if precision == "fp32" and not apart <= TOLERANCE:
        sys.exit("the two sides do not compute the same training, so their times cannot be compared")


if __name__ == "__main__":
    main()
