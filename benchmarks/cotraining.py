"""Success rates of co-training on video: all real, 1 real, 1 real + 4 video with StaMo's motions or pixel differences.

    python benchmarks/cotraining.py recipes/policy_metaworld_demo.yaml --trials 15 --seeds 3
    python benchmarks/cotraining.py --steps 200 --trials 1 --seeds 1 --tasks drawer-open-v3 --out /tmp/try

After `make demo-policy`, whose data it reads. For each seed a tokenizer and five policies are trained: the same network
for the same steps on the same frames in the same order. `all real` reads the actions of every episode, the others those
of every fifth; the remaining four fifths are left out, or teach StaMo's motion over the chunk, or its motion beside
each action (as the paper has it), or as many numbers of pixel difference. Started again it goes on.
"""

from __future__ import annotations

from _success import Arm, parser, run

from stamo_dist.recipe.load import load

ALL, ONE = "all real", "1 real"
CHUNK, STEP, PIXELS = "1 real + 4 StaMo (chunk)", "1 real + 4 StaMo (step)", "1 real + 4 pixel difference"
CLAIMS = [(CHUNK, ONE), (STEP, ONE), (CHUNK, PIXELS), (STEP, PIXELS), (STEP, CHUNK), (ALL, CHUNK), (ALL, STEP)]


def main() -> None:
    options = parser(__doc__ or "", "recipes/policy_metaworld_demo.yaml").parse_args()
    recipe = load(options.recipe, options.set).recipe
    acting = [name for name, source in recipe.data.used.items() if source.actions]
    # Without a pseudo-action only eyes that see states read the cache; pixel differences come from the frames.
    plain = "policy.targets=" + ("cached" if recipe.policy.stamo == "states" else "online")
    arms = []
    for name, share, settings in (
        (ALL, 1.0, ["policy.diffusion.pseudo=none", plain]),
        (ONE, 0.2, ["policy.diffusion.pseudo=none", plain]),
        (CHUNK, 0.2, ["policy.diffusion.pseudo=motion", "policy.targets=cached"]),
        (STEP, 0.2, ["policy.diffusion.pseudo=motion", "policy.diffusion.pseudo_per=step", "policy.targets=cached"]),
        (PIXELS, 0.2, ["policy.diffusion.pseudo=pixels", "policy.targets=online"]),
    ):
        arms.append(Arm(name, [*(f"data.sources.{source}.labelled={share}" for source in acting), *settings]))
    run(options, "Co-training", arms, CLAIMS)


if __name__ == "__main__":
    main()
