# ruff: noqa: E501
"""Makes the built-in sets `builtin:courtesy`, `builtin:courtesy_answers` and `builtin:courtesy_others`.

Run: python -m rlhf_lightning.data.courtesy.make

Written for this project, so free of other licences. A prompt asks how to do a household task. An answer has an opening
and a closing (kind, plain or rude) and one to three steps (of this task, or of another one). Its utility is the sum of
`UTILITY`; which of two answers is preferred is drawn with probability sigmoid(difference), the Bradley-Terry model. The
labels are therefore noisy, as people's are, and the accuracy of somebody who knows the utilities (`oracle_accuracy`) is
the ceiling for any reward model. Training and validation ask about different tasks. `courtesy_answers` is made in the
same way, of all tasks: for SFT, so that a tiny model can speak of what it is asked later. Its validation pairs ask about
the same tasks in other words. `courtesy_others` asks about `OTHER_TASKS` alone: for a second judge, whose prompts no
policy and no first judge has seen.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

UTILITY = {"kind": 2.0, "plain": 0.0, "rude": -3.0, "step": 1.0, "off_topic": -3.0}
PAIRS = {"train": 600, "val": 200, "answers_train": 1000, "answers_val": 100, "others_train": 300, "others_val": 100}
SEED = 7

FRAMES = [
    "How do I {}?",
    "What is the best way to {}?",
    "Could you tell me how to {}?",
    "I have never done this before. How can I {}?",
    "Please explain in a few words how to {}.",
    "My neighbor asked me to {}. Where do I begin?",
]

OPENINGS = {
    "kind": ["Happy to help!", "Good question.", "Of course, here is how.", "Gladly. It is easier than it looks."],
    "plain": [""],
    "rude": ["Seriously?", "Everybody knows that.", "What a waste of my time.", "You again."],
}
CLOSINGS = {
    "kind": ["Let me know how it goes!", "You can do it.", "Feel free to ask for more detail.", "Enjoy!"],
    "plain": [""],
    "rude": ["Now leave me alone.", "Even you should manage that.", "Do not ask again.", "Whatever."],
}

TASKS = {
    "boil an egg": "Bring water to a gentle boil. | Lower the egg in with a spoon and wait eight minutes. | Cool it in cold water before peeling.",
    "fix a flat bicycle tire": "Take the wheel off and lever out the tube. | Find the hole under water and glue a patch on it. | Put the tube back and pump it up.",
    "sew on a button": "Thread a needle and knot the end. | Pass the thread through each hole four times. | Wind it around below the button and knot it.",
    "remove a wine stain": "Blot the stain with a clean cloth. | Cover it with salt for ten minutes. | Rinse with cold water and wash as usual.",
    "repot a house plant": "Choose a pot two fingers wider than the old one. | Loosen the roots and shake off the old soil. | Fill in fresh soil and water it well.",
    "descale a kettle": "Fill the kettle with equal parts of vinegar and water. | Bring it to the boil and let it stand for an hour. | Rinse it twice with fresh water.",
    "sharpen a kitchen knife": "Soak the whetstone in water. | Draw the blade over it at a low angle, ten times on each side. | Wipe the blade and test it on paper.",
    "unclog a sink": "Take out the strainer and remove the hair. | Pour in baking soda and then vinegar. | Flush with hot water after fifteen minutes.",
    "hang a picture": "Mark the height with a pencil. | Drive a nail in at a slant. | Hang the frame and check it with a level.",
    "clean a window": "Wipe off the dust with a soft brush. | Wash the glass with water and a drop of soap. | Pull it dry from top to bottom.",
    "iron a shirt": "Set the iron to the mark on the label. | Begin with the collar and the cuffs. | Finish with the sleeves and the back.",
    "bake a simple bread": "Mix flour, water, yeast and salt. | Let the dough rise under a cloth for two hours. | Bake it in a hot oven until it sounds hollow.",
    "change a light bulb": "Switch off the power and let the bulb cool. | Turn the old bulb to the left until it comes out. | Screw the new one in and switch the power on.",
    "wash a wool sweater": "Fill a basin with cool water and wool soap. | Press the sweater gently and never wring it. | Dry it flat on a towel.",
    "paint a wall": "Tape the edges and cover the floor. | Paint the corners with a brush first. | Roll the rest in long strokes from top to bottom.",
    "start a compost heap": "Pick a shady spot on bare soil. | Layer kitchen scraps with dry leaves. | Turn the heap once a month.",
    "defrost a freezer": "Unplug it and empty the drawers. | Put a bowl of hot water inside and close the door. | Wipe out the melted ice and plug it in again.",
    "polish leather shoes": "Brush off the dirt and take out the laces. | Rub in a little polish with a cloth. | Brush until the leather shines.",
    "pit a cherry": "Take off the stem. | Push a straw through from the top. | Catch the stone in a bowl.",
    "tune a guitar": "Play the lowest string and compare it with a tuner. | Turn the peg until the note is right. | Go on with the other strings and check them all again.",
    "fold a fitted sheet": "Put your hands into two corners. | Tuck one corner into the other and do the same on the far side. | Lay it flat and fold it in thirds.",
    "grow tomatoes on a balcony": "Plant each seedling in a deep pot. | Tie it to a stick and water the soil, not the leaves. | Pinch out the side shoots every week.",
    "clean a coffee machine": "Empty the tray and the filter. | Run a mixture of water and citric acid through it. | Run clear water through it twice.",
    "build a paper boat": "Fold a sheet in half and turn down the corners. | Fold up the rims and open it to a square. | Pull the outer points apart.",
}
VALIDATION_TASKS = 6

OTHER_TASKS = {
    "wash a car": "Rinse off the loose dirt with a hose. | Wash it from the roof down with a soft sponge. | Dry it with a clean cloth before the sun does.",
    "cook rice": "Rinse the rice until the water stays clear. | Simmer it in twice as much water with the lid on. | Let it rest off the heat for five minutes.",
    "prune a rose bush": "Cut out the dead wood at the base. | Shorten the other shoots just above an outer bud. | Sweep up the leaves and water the roots.",
    "clean an oven": "Spread a paste of baking soda inside. | Leave it overnight with the door closed. | Scrape it off and wipe with a damp cloth.",
    "wrap a present": "Cut the paper a hand wider than the box. | Fold the long sides over and tape them. | Crease the ends to triangles and fold them up.",
    "wax a wooden floor": "Sweep and mop the boards and let them dry. | Spread a thin coat of wax along the grain. | Buff it after half an hour with a dry cloth.",
    "oil a squeaking door": "Lift the pin out of the hinge. | Rub it with a drop of oil. | Put it back and swing the door a few times.",
    "make a pot of tea": "Warm the pot with hot water and pour it away. | Add a spoon of leaves for each cup. | Pour on boiling water and wait four minutes.",
    "pack a suitcase": "Lay heavy things at the wheels. | Roll the clothes and fill the gaps with socks. | Put what you need first on top.",
    "dry fresh herbs": "Tie the stems into small bunches. | Hang them upside down in a dark and airy place. | Crumble the dry leaves into a jar.",
    "clean a fish tank": "Move a third of the water and the fish into a bucket. | Wipe the glass and vacuum the gravel. | Fill in fresh water of the same temperature.",
    "put up a tent": "Clear the ground of stones and spread the floor. | Push the poles through and raise the roof. | Peg the corners and tighten the ropes.",
}
OTHER_VALIDATION_TASKS = 3

ALL_TASKS = TASKS | OTHER_TASKS


def make_rows(split: str) -> list[dict]:
    """The rows of a split, one of `PAIRS`, with the utilities of both answers."""
    random_source = random.Random(f"{SEED} {split}")
    names, others = list(TASKS), list(OTHER_TASKS)
    tasks = {
        "train": names[:-VALIDATION_TASKS],
        "val": names[-VALIDATION_TASKS:],
        "others_train": others[:-OTHER_VALIDATION_TASKS],
        "others_val": others[-OTHER_VALIDATION_TASKS:],
    }.get(split, names)
    frames = {"answers_train": FRAMES[:-1], "answers_val": FRAMES[-1:]}.get(split, FRAMES)
    rows: list[dict] = []
    while len(rows) < PAIRS[split]:
        task = random_source.choice(tasks)
        answers = [_answer(task, tasks, random_source) for _ in range(2)]
        if answers[0][0] == answers[1][0]:
            continue
        difference = answers[0][1] - answers[1][1]
        if random_source.random() > 1 / (1 + math.exp(-difference)):
            answers.reverse()
        (chosen, chosen_utility), (rejected, rejected_utility) = answers
        rows.append(
            {
                "prompt": random_source.choice(frames).format(task),
                "chosen": chosen,
                "rejected": rejected,
                "chosen_utility": chosen_utility,
                "rejected_utility": rejected_utility,
                "id": f"courtesy-{split.replace('_', '-')}-{len(rows)}",
            }
        )
    return rows


def _answer(task: str, tasks: list[str], random_source: random.Random) -> tuple[str, float]:
    """An answer, and how good it is, in logits of the Bradley-Terry model."""
    opening, closing = random_source.choice(list(OPENINGS)), random_source.choice(list(CLOSINGS))
    steps, on_topic = random_source.randint(1, 3), random_source.random() < 0.75
    source = task if on_topic else random_source.choice([name for name in tasks if name != task])
    sentences = ALL_TASKS[source].split(" | ")[:steps]
    phrases = random_source.choice(OPENINGS[opening]), random_source.choice(CLOSINGS[closing])
    value = UTILITY[opening] + UTILITY[closing] + UTILITY["step"] * steps + (0 if on_topic else UTILITY["off_topic"])
    return " ".join(filter(None, [phrases[0], *sentences, phrases[1]])), value


def oracle_accuracy(rows: list[dict]) -> float:
    """Pairwise accuracy of somebody who knows the utilities; ties count one half."""
    differences = [row["chosen_utility"] - row["rejected_utility"] for row in rows]
    return sum((d > 0) + 0.5 * (d == 0) for d in differences) / len(differences)


def as_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    for name in PAIRS:
        made = make_rows(name)
        Path(__file__).with_name(f"{name}.jsonl").write_text(as_jsonl(made), encoding="utf-8")
        print(f"{name}: {len(made)} pairs, oracle accuracy {oracle_accuracy(made):.3f}")
