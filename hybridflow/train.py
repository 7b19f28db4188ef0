"""Train a hybrid model: `python -m hybridflow.train`."""

import sys
from datetime import datetime
from pathlib import Path

from hybridflow.cli import command, parse_config, preset, take_option
from hybridflow.config import PRESETS, Config
from hybridflow.errors import InputError
from hybridflow.run import RunFolder
from hybridflow.trainer import resume, train

__all__: list[str] = []

_PROGRAM = "python -m hybridflow.train"
_DESCRIPTION = f"""Train a flow, a Gaussian mixture and a discriminator together, semi-supervised.

--preset NAME starts from a preset: {", ".join(PRESETS)}; by default the one named after the data set.
--resume RUN continues a run from its last checkpoint."""
_RESUMABLE = {"steps", "epochs", "minutes", "device", "fused", "graphs", "profile", "data_dir"}


@command
def main() -> None:
    """Command line."""
    args = sys.argv[1:]
    resumed, args = take_option(args, "--resume")
    if resumed is None:
        defaults, args = preset(args)
        config = parse_config(defaults, args, _PROGRAM, _DESCRIPTION)
        sys.exit(train(config, RunFolder(config.out or _default_folder(config))))
    folder = RunFolder(Path(resumed))
    saved = folder.read_config()
    config = parse_config(saved, args, _PROGRAM, _DESCRIPTION)
    changed = {name for name in vars(config) if getattr(config, name) != getattr(saved, name)}
    if fixed := sorted(changed - _RESUMABLE):
        allowed = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(_RESUMABLE))
        raise InputError(
            f"--resume: {', '.join(fixed)} differ from those of {folder.path}; "
            f"a resumed run can change {allowed} only"
        )
    sys.exit(resume(config, folder))


def _default_folder(config: Config) -> Path:
    started = datetime.now().strftime("%Y%m%d-%H%M%S")
    objective = "" if config.objective == "full" else f"-{config.objective}"
    return Path("runs") / f"{config.dataset}-{config.labels}{objective}-s{config.seed}-{started}"


if __name__ == "__main__":
    main()
