"""The demonstration's commands, and what they make."""

from __future__ import annotations

_TASKS = "drawer-open-v3,drawer-close-v3,button-press-topdown-v3,door-open-v3"
#: The whole way, small and real: simulate, shard, mix, train, kill, go on, measure.
DEMO = """\
data simulate libero demo/raw/libero --tasks libero_spatial/2 --episodes 20 --size 128 --cameras agentview
data simulate metaworld demo/raw/metaworld --tasks drawer-open-v3 --episodes 16 --size 128 --cameras corner3
data convert libero demo/raw/libero demo/shards/libero --size 64 --val-fraction 0.15
data convert metaworld demo/raw/metaworld demo/shards/metaworld --size 64 --val-fraction 0.13
data stats demo/shards/libero
data stats demo/shards/metaworld
mix tokenizer_demo
train vae_demo --nproc 2
encode tokenizer_demo
kill train tokenizer_demo --nproc 2
train tokenizer_demo --nproc 2
eval reconstruct demo/runs/tokenizer
eval interpolate demo/runs/tokenizer
report demo/runs/tokenizer
"""
#: After it: one policy for four tasks, and how often it solves each, beside random actions and the expert.
POLICY = f"""\
data simulate metaworld demo/raw/metaworld_tasks --tasks {_TASKS} --episodes 30 --size 128 --cameras corner3
data convert metaworld demo/raw/metaworld_tasks demo/shards/metaworld_tasks --size 64 --val-fraction 0.1
data stats demo/shards/metaworld_tasks
encode policy_metaworld_demo
train policy_metaworld_demo --nproc 2
eval rollout demo/runs/policy_metaworld --tasks {_TASKS} --baselines
report demo/runs/policy_metaworld
"""


def made_by(path: str) -> str:
    """The command that makes a folder of the demonstration; "" for any other folder."""
    commands = {"stamo demo": DEMO, "stamo demo --policy": POLICY}
    return next((command for command, lines in commands.items() if path in lines.split()), "")
