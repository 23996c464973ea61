"""`glmtune train`: from a run's options to its finished folder. Loads torch only when the run is known to be right."""

import os
from pathlib import Path

from . import estimate, families, files, options, plan, runfolder, settings
from .errors import UserError
from .progress import Report, Screen
from .run import Resolved, Run
from .stages import STAGES


def train(run: Run, *, resume: bool = False, screen: Screen | None = None) -> Report:
    """Carries out a run and leaves its folder (docs/run-files.md says what is in it).

    Raises UserError for everything the user can mend, before the model is loaded where possible; Interrupted after Ctrl-C, when a checkpoint has been written.
    """
    if STAGES[run.stage.kind].loss is None:
        raise UserError(
            f"stage {run.stage.kind} cannot be trained yet; `glmtune show` and `glmtune data check` read its rows already"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: training on several processes is not built yet; start one process"
        )
    screen = screen or Screen()
    out = Path(run.out)
    with runfolder.claimed(out, resume):
        stored = runfolder.stored(out, run) if resume else None
        if stored is not None and (out / "finished.json").is_file():
            done = runfolder.read_finished(out)
            screen.say(f"{out} is finished already; nothing to do")
            return Report.of(out, done, runfolder.read_jsonl(out / "samples.jsonl"))
        base = None if stored is None else families.base_of(stored, next(iter(runfolder.saved(out).values()), out), screen.say)
        run = run if stored is None else settings.as_recorded(run, stored.resolved or {})
        if stored is not None and (began := (stored.resolved or {}).get("date")):
            run = run.model_copy(update={"date": began})  # what the prompts of this run say, whatever the day
        made = plan.make(run, screen.say, screen.counting("rows tokenised"), base)
        screen.stop()
        chosen = dict(stored.resolved or {}) if stored is not None else {}
        if not chosen.keys() >= Resolved.__annotations__.keys():  # new, or of a version that chose less
            chosen = settings.resolve(made) | settings.base(made) | settings.built_on(run) | chosen
        settings.refuse_other_data(chosen, made, out)
        settings.refuse_without_room(made, chosen, out)
        screen.plan(made)
        screen.say(settings.line(chosen))
        how = settings.setting(made, chosen)
        rate = settings.matmul_rate(chosen["device"], chosen["precision"])
        epoch = estimate.seconds(made.shape, how, sum(made.lengths), made.examples.num_learned, rate)
        screen.needs(estimate.memory(made.shape, how), epoch, rate)
        from .loop import Loop
        from .session import Session

        try:
            session = Session(made, chosen, out, screen)
            if stored is None:  # only now, so that a run that was refused leaves nothing behind
                options.write(run.model_copy(update={"resolved": chosen}), out / "run.yaml", runfolder.header())
            return Loop(session).run(resume)
        except OSError as error:
            if error.errno in files.DISK:
                raise UserError(
                    f"{files.told(error, out)}; {runfolder.last_good(out)}. Then: glmtune train {out / 'run.yaml'} --resume"
                ) from None
            raise
