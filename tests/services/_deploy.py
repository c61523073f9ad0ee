"""Deployments of the pipeline without a model."""

import os
import pathlib
import sys

from hwcore.diffusion.launch import Deployment, RoleSpec
from hwcore.diffusion.roles import PIPELINE
from hwcore.diffusion.router.config import RouterConfig

HERE = pathlib.Path(__file__).parent
ROLES = HERE.parent / "diffusion" / "serving"
PATHS = os.pathsep.join([str(HERE), str(ROLES), *filter(None, sys.path)])
"""Where a child finds what it imports."""
WORKER = {"pool_bytes": 16 << 20, "slot_bytes": [1 << 16] * 4}


def deployment(counts=(1, 1, 1), worker=(), backend="cpu", router=(), environment=(), **options):
    """Three roles, as many of each as `counts` says; the rest goes to each role."""
    environment = {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"} | dict(environment)
    return Deployment(
        roles=tuple(
            RoleSpec(
                role=role,
                factory="_roles:make",
                options={"role": role, **options},
                count=count,
                backend=backend,
                environment=environment,
                worker=WORKER | dict(worker),
            )
            for role, count in zip(PIPELINE, counts, strict=True)
        ),
        router=RouterConfig(**dict(router)),
    )
