"""One run in progress: model, method, optimizer and counters put together, saved and loaded. Never sees rows of data."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import __version__, adapters, families, forward, method, methods, optimizer, plan, runfolder
from .data import fill
from .files import digest as digest_of
from .files import sync_folder, whole
from .progress import Screen
from .stages import STAGES
from .world import ALONE, World


class Session:
    """The parts of a run between two steps. `folder` is OUT; `world` says which process this is."""

    def __init__(self, made: plan.Plan, settings: dict[str, Any], out: Path, screen: Screen, world: World = ALONE):
        self.plan, self.settings, self.out, self.screen, self.world = made, settings, out, screen, world
        self.state = runfolder.State()
        options_ = made.run
        torch.set_num_threads(settings["threads"])
        self.device = families.pick_device(settings["device"])
        compute = families.as_dtype(settings["precision"])
        self.method = method.of(made.method)
        self.model = families.load_model(
            made.folder,
            dtype=torch.float32 if self.method.whole else compute,
            device=self.device,
            quant=settings["quant"],
        )
        for module in self.model.modules():  # a model's own dropout is not seeded by row; every published family has none
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        methods.prepare(self.model, compute)
        methods.attach(self.model, made.method, options_.seed)
        self.method.begin(self.model, made.method, lambda count: _first_ids(made, count))
        if options_.neftune:
            methods.add_neftune(self.model, options_.neftune, options_.seed)
        self.parameters = methods.trainable(self.model)
        path, _ = forward.choose_path(self.model, options_, made.method, settings, made.longest)
        self.forward = forward.Forward(
            self.model, path, compile=path == "fused" and settings["compile"] and forward.fused.compile_works()
        )
        if self.forward.noise is not None or settings["checkpointing"]:
            self.model.train()
        if settings["checkpointing"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = optimizer.make(options_, settings["lr"], self.parameters, self.device)
        self.scaler = optimizer.Scaler(self.state) if settings["precision"] == "fp16" else None
        self.stage = STAGES[options_.stage.kind]

    def save_result(self, folder: Path, final: bool = False) -> None:
        """What was trained, as something other programs open: an adapter folder, or a whole model. With tokenizer and template."""
        target = folder / ("adapter" if self.method.adapter else "model") if final else folder
        work = target.with_name(target.name + ".part") if final else target
        if final:
            shutil.rmtree(work, ignore_errors=True)
        base = self._base_name()
        self.method.save(self.model, work, self.plan.method, base, self.settings["fingerprint"])
        families.save_tokenizer(self.plan.folder, self.plan.template, work)
        whole(work / "README.md", _readme(self.plan, base, not self.method.adapter, self.method.not_in_peft(self.model)))
        if final:
            shutil.rmtree(target, ignore_errors=True)
            work.rename(target)

    def _base_name(self) -> str:
        """What plain transformers and PEFT can open: a hub id as it is, else the folder."""
        name = self.plan.run.model
        return name if "/" in name and not Path(name).expanduser().exists() else str(self.plan.folder.resolve())

    def save(self, keep_best: float | None = None) -> None:
        """A checkpoint under a temporary name, fsynced, renamed; then old ones are removed."""
        if keep_best is not None and (self.state.best_loss is None or keep_best < self.state.best_loss):
            self.state.best_loss, self.state.best_step = keep_best, self.state.step
        folder = self.out / "checkpoints" / f"step-{self.state.step}"
        if folder.exists():
            return
        work = folder.with_name(f".part-{self.state.step}")
        shutil.rmtree(work, ignore_errors=True)
        try:
            self.save_result(work)
            if self.method.adapter:  # the adapter's files hold it rotated or joined with others
                trained = {name: parameter.detach().cpu() for name, parameter in self.parameters.items()}
                methods.write_tensors(trained, work / "trained.safetensors")
            tensors, numbers = optimizer.state_of(self.optimizer, self.parameters)
            methods.write_tensors(tensors, work / "optimizer.safetensors")
            shutil.copy(self.out / "run.yaml", work / "run.yaml")
            files = {p.name: digest_of(p) for p in sorted(work.iterdir())}
            whole(work / "state.json", json.dumps({**asdict(self.state), "numbers": numbers, "files": files}, indent=1) + "\n")
            sync_folder(work)
            work.rename(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        for step, old in list(runfolder.saved(self.out).items())[self.plan.run.save.keep :]:
            if step != self.state.best_step:
                shutil.rmtree(old)

    def load(self) -> None:
        """Continues from the newest complete checkpoint, or from step 0, and says which."""
        for leftover in (self.out / "checkpoints").glob(".part-*"):
            shutil.rmtree(leftover)
        found = next(runfolder.checkpoints(self.out), None)
        last = found[1].step if found else 0
        damaged = {step: path for step, path in runfolder.saved(self.out).items() if step > last}
        if damaged:
            self.screen.say(f"checkpoint step-{max(damaged)} is damaged; going back to step-{last}")
        for path in damaged.values():
            shutil.rmtree(path)
        if found is None:
            self.screen.say("there is no complete checkpoint yet; starting at step 0")
            return
        folder, kept = found
        self.screen.say(f"continuing from {folder} (step {kept.step} of {self.settings['steps']})")
        for name in asdict(self.state):
            setattr(self.state, name, getattr(kept, name))
        if self.state.micro_tokens is not None:
            self.settings["micro_tokens"] = self.state.micro_tokens
        if self.state.best_step is not None and self.state.best_step > self.state.step:
            self.state.best_step = self.state.best_loss = None
        files = (
            [folder / "trained.safetensors"] if (folder / "trained.safetensors").is_file() else folder.glob("model*.safetensors")
        )
        trained: dict[str, torch.Tensor] = {}
        for path in files:
            trained |= methods.read_tensors(path)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(trained[name])
        optimizer.restore(self.optimizer, self.parameters, methods.read_tensors(folder / "optimizer.safetensors"), kept.numbers)


def _first_ids(made: plan.Plan, count: int) -> list[int]:
    found: list[int] = []
    for example in made.examples[: min(count, len(made.examples))]:
        found += example.ids
        if len(found) >= count:
            break
    return found


def _readme(made: plan.Plan, base: str, whole: bool, not_in_peft: str | None) -> str:
    """README.md of what was trained. base: what plain transformers should open; not_in_peft: why plain PEFT would compute something else."""
    run = made.run
    system = f" It was trained with the system prompt {fill(run.system, run.variables)!r}." if run.system else ""
    about = (
        f"Trained on {run.model} with method {run.method.kind}{f' on weights kept in {made.quant}' if made.quant else ''}.{system}"
    )
    if not whole:
        return adapters.readme(base, made.folder, about, not_in_peft)
    return (
        f"---\nbase_model: {base}\nlibrary_name: transformers\n---\n\n{about} (glmtune {__version__}). The licence of the base model applies.\n\n"
        "```sh\nglmtune chat THIS_FOLDER\n```\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n```\n\nThe chat format that was trained is `chat_template.jinja`.\n'
    )


def peak_memory(device: Any) -> float:
    """Bytes: of the card, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
