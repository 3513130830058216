"""What this machine has for a command to use: devices to compute on."""

from __future__ import annotations

from fedmerge.errors import ConfigError


def require_device(name: str | None) -> str | None:
    """Return `name` if torch can compute there (`cpu`, `cuda`, `cuda:1`) or it is None, else raise `ConfigError`."""
    if name is None:
        return None
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise ConfigError(f"--device {name:.60}: no such device", hint="cpu, cuda or cuda:N") from err
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices",
            hint="leave --device out, or use cpu; for a GPU, install a driver and a build of torch with CUDA",
        )
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"--device {name}: merges run on cpu or cuda")
    return name
