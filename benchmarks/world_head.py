"""Success rates with and without the world head: OpenVLA* without, with the next state, with the motion to it.

    python benchmarks/world_head.py recipes/policy_oft_metaworld_demo.yaml
    python benchmarks/world_head.py recipes/policy_tokens_metaworld_demo.yaml
    python benchmarks/world_head.py --steps 100 --trials 1 --seeds 1 --out /tmp/try

After `make demo-policy`, whose episodes of the drawer it reads (docs/results.md converts them). For each seed a
tokenizer and three policies are trained, which differ in nothing but the head. Started again it goes on.
"""

from __future__ import annotations

from _success import Arm, parser, run

WITHOUT, STATE, MOTION = "without the head", "state", "motion"


def main() -> None:
    options_parser = parser(__doc__ or "", "recipes/policy_oft_metaworld_demo.yaml")
    options_parser.set_defaults(tasks="drawer-open-v3", trials=20)
    options_parser.add_argument(
        "--actions",
        choices=["tokens", "parallel_tokens", "regression"],
        help="policy.actions; the recipe's when omitted",
    )
    options = options_parser.parse_args()
    options.set += [f"policy.actions={options.actions}"] if options.actions else []
    arms = [
        Arm(WITHOUT, ["policy.world=null"]),
        Arm(STATE, ["policy.world.target=state"]),
        Arm(MOTION, ["policy.world.target=motion"]),
    ]
    run(options, "World head", arms, [(STATE, WITHOUT), (MOTION, WITHOUT), (MOTION, STATE)])


if __name__ == "__main__":
    main()
