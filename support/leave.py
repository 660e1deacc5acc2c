"""What stays of a run in its folder: results, a picture, records, and the models."""
import argparse
from pathlib import Path

from torch import Tensor

from support.again import keep_run
from support.files import write_whole
from support.inputs import Inputs
from support.records import write_records
from support.report import name_models, plot_run, sample_text, samples_file
from support.results import add_results, export_model


def leave(args: argparse.Namespace, inputs: Inputs, run, best: Tensor, made_by: dict) -> None:
    """Write everything that stays of a run of train.py, and print where it is.

    best (P, G): the rewards of best-of-n. made_by: the settings for the lines of results.jsonl.
    """
    out = Path(args.out)
    world = run.world
    encoding = world.text.encoding
    name = f"n{run.n}-seed{run.seed}"
    # the column beta is for methods in experiments/
    lines = [row | {"seed": run.seed, "beta": None} | made_by for row in run.rows]
    add_results(out, lines)
    rewards = [world.candidates.reward, best, run.evaluated["reward"]]
    plot_run(out / "vbon.png", run.rows, rewards, world.held_out.reward, run.history)

    # ---- responses: some to read, all to compute with
    prompts = world.held_out.prompt
    models = name_models(run.n, world.reference, run.policy)
    some = sample_text(encoding, prompts[:8].to(inputs.device), world.reward, models,
                       world.settings.text.length, run.seed)
    some = samples_file(some, run.rows, len(prompts))
    write_whole(out / "samples.txt", some.encode("utf-8"))
    size = write_records(out, name, world, run.evaluated, run.history)

    # ---- the models; paths as they were given
    paths = {"given": {"data": args.data, "reward": args.reward, "init": args.init}}
    export_model(out / f"reference-seed{run.seed}", world.reference, encoding, lines[0], paths)
    export_model(out / f"policy-{name}", run.policy, encoding, lines[-1], paths)
    keep_run(out, run.n, run.seed, world, inputs)
    if args.quick:
        print("\n--quick shows only that the program runs: its models are hardly trained.")
    print(f"\n{out}/ holds the picture vbon.png, some responses in samples.txt and all in "
          f"responses-*.jsonl\n({size}), the policy in policy-{name}, the reference in "
          f"reference-seed{run.seed}")
