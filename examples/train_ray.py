"""Trains on a Ray cluster: what `train.py` does, with its config, in Ray Train's workers.

    python examples/train_ray.py --output runs/digits --num_workers 2
    RAY_ADDRESS=ray://head:10001 python examples/train_ray.py --config mine.yaml --num_workers 8 --parallel fsdp

The output has to be a folder that all machines see. When a worker dies, Ray starts the workers again, and they go on
from the last checkpoint.
"""

import os
import sys
from pathlib import Path
from typing import Any

import jsonargparse
import ray
from ray import train as ray_train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from training.config import Config


def work(given: dict[str, Any]) -> None:
    """What every worker does."""
    from training.trainer import train  # which takes seconds, and those who only look after workers need not

    train(Config(**given), report=ray_train.report)


def main() -> None:
    """Reads the command line and trains."""
    parser = jsonargparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Config)
    parser.add_argument("--num_workers", type=int, default=2, help="processes that train, on all machines together")
    parser.add_argument("--max_failures", type=int, default=3, help="how often to begin again")
    given = parser.parse_args()
    num_workers, failures = given.pop("num_workers"), given.pop("max_failures")
    given.pop("config")
    config = parser.instantiate_classes(given).as_dict()
    config["output"] = str(Path(config["output"]).resolve())
    Config(**config)
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}})  # this program's folder first
    gpu = config["device"] == "cuda"
    trainer = TorchTrainer(
        work,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=gpu),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(
            name="ray", storage_path=config["output"], failure_config=FailureConfig(max_failures=failures)
        ),
    )
    trainer.fit()
    print(f"{config['output']}/model")


if __name__ == "__main__":
    main()
