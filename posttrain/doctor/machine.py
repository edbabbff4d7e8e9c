"""What the machine and its packages can do, whatever the run."""

from __future__ import annotations

import importlib.util
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from posttrain.doctor.findings import Check, Finding
from posttrain.places import ROOT

INSTALL = "make setup, or pip install -c constraints.txt -e ."
TOLERANCE = 0.02  # of the largest entry: a product in bf16, whose numbers have 8 bits, of 256 terms


def checks() -> dict[str, Check]:
    """Name -> check, in the order in which one thing needs the other."""
    return {
        "Python": python,
        "packages": packages,
        "GPU": gpu,
        "bf16": bf16,
        "NF4": nf4,
        "kernels": kernels,
        "Hub token": token,
    }


def python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    wanted = SpecifierSet(_project()["requires-python"])
    told = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if platform.python_version() in wanted:
        yield Finding("ok", "Python", told)
    else:
        yield Finding("broken", "Python", told, f"install Python {wanted}")


def packages() -> Iterator[Finding]:
    """Installed versions beside the bounds of pyproject.toml, and beside the exact set of constraints.txt."""
    from packaging.requirements import Requirement

    found = dict[str, str]()
    for requirement in map(Requirement, _project()["dependencies"]):
        here = _version(requirement.name)
        if here is None:
            yield Finding("broken", "packages", f"{requirement.name} is not installed", INSTALL)
        elif here not in requirement.specifier:
            bounds = f"{requirement.name} {here} is outside {requirement.specifier}, with which this was tested"
            yield Finding("warning", "packages", bounds, INSTALL)
        found[requirement.name] = here or ""
    file = ROOT / "constraints.txt"  # a wheel has none
    exact = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", file.read_text(encoding="utf-8") if file.is_file() else ""))
    tested = {name: exact.get(name, here) for name, here in found.items()}
    # A build for CUDA or the CPU has its name behind a +.
    others = [f"{name} {here} (tested: {tested[name]})" for name, here in found.items() if _release(here) != tested[name]]
    told = f"others than the exact set that was tested: {', '.join(others)}" if others else "the exact set that was tested"
    yield Finding("ok", "packages", f"{len(found)} looked at; {told}")


def _release(of: str) -> str:
    return of.partition("+")[0]


def gpu() -> Iterator[Finding]:
    import torch

    cards = sorted(Path("/dev").glob("nvidia[0-9]*"))
    build = f"torch {torch.__version__} for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU'}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            told = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute {card.major}.{card.minor}; {build}{_driver()}"
            yield Finding("ok", "GPU", told)
    elif cards and not torch.version.cuda:
        yield Finding(
            "broken", "GPU", f"{len(cards)} in this machine, and {build}", "install torch for CUDA (https://pytorch.org)"
        )
    elif cards:
        remedy = "update the driver, or install torch for an older CUDA; CUDA_VISIBLE_DEVICES may hide the card, too"
        yield Finding("broken", "GPU", f"{len(cards)} in this machine, and none that torch can use; {build}{_driver()}", remedy)
    else:
        yield Finding("ok", "GPU", f"none: models of some hundred million weights train on this CPU; {build}")


def _driver() -> str:
    """The driver's version, where its own tool says it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f", driver {done.stdout.splitlines()[0].strip()}" if done.returncode == 0 and done.stdout.strip() else ""


def bf16() -> Iterator[Finding]:
    """A product in bf16 on the device that trains, beside the one in fp32."""
    import torch

    from posttrain.models.base import device

    one, other = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    product = (one.bfloat16().to(device()) @ other.bfloat16().to(device())).float().cpu()
    exact = one.bfloat16().float() @ other.bfloat16().float()
    if _differs(product, exact):
        yield Finding("broken", "bf16", "a product is wrong", "set model.dtype=float32, and report it with --report")
    elif device().type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("warning", "bf16", "this GPU emulates it, slowly", "set model.dtype=float16")
    else:
        yield Finding("ok", "bf16", f"products are right on {device().type}")


def nf4() -> Iterator[Finding]:
    """A forward and a backward pass through a packed layer, beside the same through its unpacked weight."""
    from posttrain.kernels.nf4 import pass_through_nf4
    from posttrain.models.base import device

    pairs = pass_through_nf4(device())
    if wrong := [name for name, (packed, plain) in pairs.items() if _differs(packed, plain)]:
        remedy = "set quantization=none, install the bitsandbytes of constraints.txt, and report it with --report"
        yield Finding("broken", "NF4", f"a packed layer's {' and '.join(wrong)} differ from those of its own weights", remedy)
    else:
        told = f"forward and backward are those of the unpacked weights (bitsandbytes {version('bitsandbytes')})"
        yield Finding("ok", "NF4", told)


def _differs(found: Any, right: Any) -> bool:
    difference = (found - right).abs().max().item()
    return not difference <= TOLERANCE * right.abs().max().item()  # of a number that is none, this is true


def kernels() -> Iterator[Finding]:
    """What can run on this device, whichever model asks."""
    from posttrain.models.base import device, fastest_attention

    attention = f"attention {fastest_attention(device())}"
    if device().type != "cuda":
        yield Finding("ok", "kernels", f"{attention}; no fused kernels, for they need a GPU")
    elif importlib.util.find_spec("liger_kernel") is None:
        remedy = "pip install -c constraints.txt -e .[liger], or model.kernels=torch, which is slower and takes more memory"
        yield Finding("warning", "kernels", f"{attention}; Liger's fused kernels are not installed", remedy)
    else:
        yield Finding("ok", "kernels", f"{attention}; Liger {_version('liger-kernel')}, Triton {_version('triton')}")


def token() -> Iterator[Finding]:
    from huggingface_hub import get_token

    none = "none: only gated or private models, and pushes, need one (hf auth login)"
    yield Finding("ok", "Hub token", "there is one (it is not shown)" if get_token() else none)


def processes(number: int) -> Iterator[Finding]:
    """Processes that torchrun starts, and a sum over all of them."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number), "-m", "posttrain.doctor.processes"]
    done = subprocess.run([sys.executable, *launch], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    what = f"{number} processes"
    if done.returncode == 0 and f"sum over {number}" in done.stdout:
        yield Finding("ok", what, f"torchrun starts them, and they reach one another: {done.stdout.strip().splitlines()[-1]}")
    else:
        why = next((line for line in done.stderr.splitlines() if "Error" in line), "no word of why")[:200]
        remedy = "ports and shared memory of the machine (docker: --ipc=host), and NCCL_DEBUG=INFO for NCCL"
        yield Finding("broken", what, f"they do not reach one another ({why.strip()})", remedy)


def _project() -> dict[str, Any]:
    """Bounds of Python and of packages: of the checkout, whose installed metadata may be older, or of the wheel."""
    file = ROOT / "pyproject.toml"
    if file.is_file():
        project: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        return project
    needed = [line for line in requires("posttrain") or () if "extra ==" not in line]
    return {"requires-python": metadata("posttrain")["Requires-Python"], "dependencies": needed}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
