"""The public clients of other servers, from PyPI, against `stamo serve`: what they are answered, and that all agree.

python benchmarks/serve_clients.py RUN

RUN: a policy's run folder that reads two views and proprioception. The clients are installed into a virtual environment
of their own, which is thrown away; an action of each protocol is compared with that over HTTP.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

PACKAGES = ("openpi-client", "vla-eval", "json-numpy", "requests")

CLIENTS = """
import asyncio, sys
import json_numpy, numpy as np, requests
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.connection import Connection
from vla_eval.runners.sync_runner import SyncEpisodeRunner

place, token = sys.argv[1:]
host, port = place.split(":")
json_numpy.patch()
about = requests.get(f"http://{place}/health", headers={"Authorization": f"Bearer {token}"}).json()
rng = np.random.default_rng(0)
image, wrist = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
state, text = np.array([1.0, 2.0]), "move the square"

answer = requests.post(
    f"http://{place}/act", headers={"Authorization": f"Bearer {token}"},
    json={"full_image": image, "wrist_image": wrist, "state": state, "instruction": text},
)
answer.raise_for_status()
wanted = np.array(answer.json())
print("OpenVLA-OFT over HTTP: a chunk", wanted.shape)

policy = WebsocketClientPolicy(host, int(port), api_key=token)
seen = {"observation/image": image, "observation/wrist_image": wrist, "observation/state": state, "prompt": text}
assert np.allclose(policy.infer(seen)["actions"], wanted, atol=1e-6)
broker = ActionChunkBroker(policy, len(wanted))
for expected in wanted:
    assert np.allclose(broker.infer(seen)["actions"], expected, atol=1e-6)
try:
    policy.infer({**seen, "prompt": ""})
except RuntimeError as error:
    print("openpi: the same chunk; an error reads:", str(error).splitlines()[-1])

class Benchmark(StepBenchmark):
    def __init__(self): super().__init__(); self.actions = []
    def get_tasks(self): return [{"name": text}]
    def reset(self, task): return 0
    def step(self, action):
        self.actions.append(action["actions"])
        return StepResult(obs=0, reward=0.0, done=len(self.actions) == 2 * len(wanted), info={})
    def make_obs(self, raw, task):
        return {"images": {"agentview": image, "wrist": wrist}, "task_description": task["name"], "states": state}
    def check_done(self, result): return result.done
    def get_step_result(self, result): return {"success": result.done}
    def get_metadata(self): return {"max_steps": 100}
    def get_action_spec(self): return {}
    def get_observation_spec(self): return {}
    def render(self): return None

async def harness():
    connection = Connection(f"ws://:{token}@{place}/vla-eval")
    await connection.connect(benchmark="toy")
    for _ in range(2):
        benchmark = Benchmark()
        await SyncEpisodeRunner().run_episode(benchmark, benchmark.get_tasks()[0], connection, max_steps=100)
        assert np.allclose(benchmark.actions, np.concatenate([wanted, wanted]), atol=1e-5)
    print("vla-eval: the same actions in two episodes;", connection.server_info["observation_params"])
    await connection.close()

asyncio.run(harness())
"""


def main() -> None:
    from serve import served_run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    os.environ["STAMO_SERVE_TOKEN"] = "only-for-this"
    with tempfile.TemporaryDirectory() as folder, served_run(options.run, 0) as url:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True, env=clean)
        command = [python, "-c", CLIENTS, url.removeprefix("http://"), os.environ["STAMO_SERVE_TOKEN"]]
        subprocess.run(command, check=True, env=clean)


if __name__ == "__main__":
    main()
