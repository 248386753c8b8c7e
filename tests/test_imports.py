"""What is imported when: what takes long comes when it is used, so that ``--help`` and a mistake are told at once."""

import subprocess
import sys
from pathlib import Path

RUNS = Path(__file__).parent.parent / "runs"
SCRIPTS = sorted(path.stem for path in RUNS.glob("*.py") if path.stem != "__init__")
HEAVY = (
    "accelerate", "matplotlib", "PIL", "pyro", "zuko", "normflows", "FrEIA", "torchvision", "torch._dynamo",
    "torch._inductor", "sklearn", "scipy", "pandas",
)  # fmt: skip


def imported(program: str) -> str:
    """What the program prints last, run in a process of its own: what is heavy among the modules it has imported."""
    program += f"\nimport sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_importing_the_package_imports_nothing_heavy():
    assert imported("import adapters, adapters.vae, adapters.priors, adapters.check.__main__") == ""


def test_a_script_that_computes_nothing_imports_nothing_heavy():
    program = f"""
import runpy, sys
for script in {SCRIPTS}:
    for words in (["--help"], ["--no-such-option"]):
        sys.argv = [script, *words]
        try:
            runpy.run_path(f"{RUNS}/{{script}}.py", run_name="__main__")
        except SystemExit as end:
            assert bool(end.code) is (words != ["--help"])
"""
    assert imported(program) == ""


def test_what_is_left_out_comes_when_it_is_asked_for():
    program = """
import sys, adapters
from adapters import FlowDistribution
from nflows.flows import MaskedAutoregressiveFlow
assert "matplotlib" not in sys.modules and "pyro" in sys.modules
import matplotlib.pyplot
assert matplotlib.pyplot.figure and set(adapters.__all__) <= set(dir(adapters))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


USES = {
    "the VAE": "adapters.vae.Encoder(2)(torch.ones(1, 784))",
    "a prior": "adapters.priors.StandardNormalPrior(2)()",
    "a distribution": "adapters.FlowDistribution",
    "a bridge": "adapters.to_library('torch', adapters.build_flow('masked-affine', 2))",
    "the ELBO": "__import__('adapters.elbo')",
}


def test_importing_pyro_leaves_argument_validation_as_it_was():
    """Each use is the first one in a process that has been split off, since importing torch takes seconds."""
    program = f"""
import os, sys, torch
from torch.distributions import Distribution
Distribution.set_default_validate_args(False)
import adapters, adapters.vae, adapters.priors
assert "pyro" not in sys.modules
for name, use in {USES}.items():
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, name
        continue
    try:
        exec(use)
        assert "pyro" in sys.modules and Distribution._validate_args is False
    except BaseException:
        os._exit(1)
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
