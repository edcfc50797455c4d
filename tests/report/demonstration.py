"""A document with every block and every odd case, for tests and for looking at. Its numbers are made up."""

from __future__ import annotations

import math

import numpy as np

from rlhf_lightning.evaluation.blocks import (
    Bar,
    BarGroup,
    Bars,
    Beside,
    Column,
    Distribution,
    Document,
    Facts,
    Histogram,
    Lines,
    Note,
    Piece,
    Pieces,
    Point,
    Reference,
    Sample,
    Samples,
    SampleText,
    Section,
    Series,
    Table,
    Verdict,
    Verdicts,
)
from rlhf_lightning.evaluation.estimates import Estimate

HOSTILE = (
    "</div></section><script>document.title='owned'</script><img src=http://example.invalid/x.png onerror=alert(1)>\n"
    "```\n# a heading\n[a link](http://example.invalid) <b>bold</b> & &amp; | a | table |\n"
    "\x1b[31mred\x1b[0m \x00 \x07 bell, rtl \u202egnp.exe\u202c, zero\u200bwidth, tag \U000e0041, lone \ud800\n"
    "שלום, עולם! مرحبا بالعالم"
)
LONG_WORD = "W" * 3000
BOOK = "\n\n".join(f"Paragraph {n}. The cat sat on the mat and looked at the reader for a while." for n in range(1200))


SUBSETS = [
    "small talk",
    "puzzles with one solution",
    "translation of idioms",
    "summaries",
    "letters to an office",
    "questions of fact",
    "recipes",
    "travel",
    "refusals that are due",
    "refusals that are not due",
    "medical advice",
    "legal advice",
    "stories",
    "poems",
    "lists",
    "code in Python",
    "code in C++",
    "code in Rust",
    "arithmetic",
    "geometry",
    "word problems",
    "units",
    "a subset whose name is so long that nobody would ever choose it but that may come from a file all the same",
]


def estimate(value: float, half: float, n: int = 300) -> Estimate:
    return Estimate(value, value - half, value + half, n, "made up")


def document() -> Document:
    draw = np.random.default_rng(0)
    names = SUBSETS
    sizes = [7, 358, 40, 91, 120, 33, 26, 100, 154, 80, 21, 47, 99, 12, 64, 164, 164, 164, 447, 88, 35, 19, 100]
    rates = [0.97, 0.52, 0.61, 0.93, 0.74, 0.66, 0.81, 0.9, 0.55, 0.47, 0.7, 0.64, 0.88, 0.33, 0.79, 0.83, 0.8, 0.77]
    rates += [0.41, 0.58, 0.63, 0.5, 0.71]
    bars = [
        Bar(name, Estimate(p, max(0, p - 1 / n**0.5), min(1, p + 1 / n**0.5), n, "wilson"))
        for name, n, p in zip(names, sizes, rates, strict=True)
    ]
    bars[20] = Bar(names[20], None)
    bars[21] = Bar(names[21], 0.5)
    groups = [
        BarGroup("Chat", bars[:7]),
        BarGroup("Safety", bars[7:12]),
        BarGroup("", []),
        BarGroup("Reasoning", bars[12:]),
    ]
    return Document(
        title="Courtesy policy, before and after DPO",
        subtitle="A made-up report that shows every block. 25 November 2026, 300 prompts, seed 0.",
        sections=[
            Section("Verdicts", [Verdicts(_verdicts()), Note("Both reward models were trained on the same pairs.")]),
            Section(
                "Reward model",
                [
                    Table(
                        ["statistic", Column("validation", ".3f"), Column("test", ".3f"), "pairs"],
                        [
                            ["pairwise accuracy", estimate(0.81, 0.027), estimate(0.79, 0.03), 2000],
                            ["pooled AUROC", estimate(0.745, 0.031), None, 2000],
                            ["calibration error", 0.0924, math.nan, 200],
                            ["mean reward", -12345.678, 1.5e12, None],
                        ],
                        "How well the rewards tell chosen from rejected",
                    ),
                    Histogram(
                        [
                            Distribution("chosen", list(draw.normal(0.6, 1, 400))),
                            Distribution("rejected", list(draw.normal(-0.4, 1.2, 400))),
                        ],
                        "reward",
                        "responses",
                        "Rewards of chosen and rejected responses",
                        references=[Reference(0.1, "mean of all")],
                    ),
                    Lines(
                        [
                            Series(
                                "reward model",
                                [
                                    Point(
                                        p,
                                        Estimate(
                                            q := p - 0.1 * math.sin(6 * p) - 0.06,
                                            q - 0.07,
                                            min(q + 0.07, 1.0),
                                            n,
                                            "wilson",
                                        ),
                                        f"n = {n}",
                                    )
                                    for p, n in [(0.55, 61), (0.65, 80), (0.75, 44), (0.85, 13), (0.95, 2)]
                                ],
                            )
                        ],
                        "predicted probability that chosen wins",
                        "observed share",
                        "Calibration",
                        diagonal="perfectly calibrated",
                        domain=(0.5, 1.0),
                        range=(0.4, 1.0),
                        spec=".0%",
                        x_spec=".0%",
                    ),
                ],
                "A reward model is judged on pairs that it was not trained on. Every number stands beside the "
                "units that it is over.\n\nIntervals are 95 % intervals, by resampling whole pairs.",
            ),
            Section(
                "Benchmark by subset",
                [
                    Bars(
                        groups,
                        "pairs",
                        "Accuracy by subset",
                        references=[Reference(0.5, "coin flip"), Reference(0.63, "the longer response wins")],
                        spec=".1%",
                    )
                ],
            ),
            Section("Policy", [Beside(_curves(draw))], "Reward against the distance from the reference policy."),
            Section(
                "Safety",
                [
                    Bars(
                        [
                            BarGroup(
                                "refusals on harmless prompts",
                                [Bar("before", estimate(0.12, 0.04, 250)), Bar("after", estimate(0.08, 0.03, 250))],
                            ),
                            BarGroup(
                                "toxicity of the responses, share of at least 0.5 by the classifier",
                                [Bar("before", None), Bar("after", 0.01)],
                            ),
                        ],
                        "prompts",
                        "Refusals before and after",
                        spec=".1%",
                    ),
                    Pieces(
                        "A row as the model gets it",
                        [Piece("<s>", "control"), Piece(HOSTILE, "prompt"), Piece("Yes.", "response masked")],
                    ),
                ],
            ),
            Section("Samples", [_samples()]),
            Section("Odd cases", [*(odd := _odd(draw)), Beside([b for b in odd if isinstance(b, Bars | Lines)][1:5])]),
            Section(
                "Provenance",
                [
                    Facts(
                        [
                            ("commit", "0123456789abcdef0123456789abcdef01234567"),
                            ("seeds", ["0", "1", "2"]),
                            ("learning rate", 5e-6),
                            ("duplicates dropped", 0),
                            ("GPU memory", None),
                            ("models", []),
                            ("a name of a setting that is far longer than its column", "/a/very/long/path" * 12),
                        ]
                    )
                ],
            ),
        ],
    )


def _verdicts() -> list[Verdict]:
    return [
        Verdict(
            "Held-out pairwise accuracy of at least 75 %",
            "met with confidence",
            estimate(0.81, 0.027, 2000),
            "pairs",
            "The whole interval lies above 75 %.",
            ".1%",
        ),
        Verdict(
            "Pooled AUROC of at least 0.70", "met", estimate(0.712, 0.03, 400), "pairs", "The interval reaches below."
        ),
        Verdict(
            "Reward up by 25 points",
            "over-optimized",
            estimate(178, 9),
            "prompts",
            "The held-out judge sees 61.6.",
            "+.1f",
        ),
        Verdict(
            "Over-refusal falls by half", "not met", estimate(-0.04, 0.03, 250), "prompts", "Fell by 4 points.", "+.1%"
        ),
        Verdict("Reward + 25 %", "not met", 3.2, "prompts", "One prompt alone has no interval.", ".1f"),
        Verdict(
            "Toxicity not above the reference's",
            "not measured",
            None,
            "responses",
            "No classifier was given, and a word list does not measure toxicity.",
        ),
    ]


def _curves(draw: np.random.Generator) -> list[Lines | Bars]:
    steps = [0, 50, 100, 150, 200, 300, 400, 600, 800]
    reward = [1.2 * math.sqrt(s / 100) - 0.1 * s / 100 for s in steps]
    learned = [Point(math.sqrt(s / 40), estimate(r, 0.15), f"step {s}") for s, r in zip(steps, reward, strict=True)]
    held_out = [
        Point(math.sqrt(s / 40), None if s == 300 else estimate(0.7 * r - 0.05 * s / 100, 0.2), f"step {s}")
        for s, r in zip(steps, reward, strict=True)
    ]
    best = [
        Point(math.sqrt(max(math.log(n) - (n - 1) / n, 0)), 0.8 * math.sqrt(2 * math.log(n)), f"best of {n}")
        for n in (1, 2, 4, 8, 16)
    ]
    walk = np.cumsum(draw.normal(0, 1, 5000))
    return [
        Lines(
            [
                Series("proxy reward model", learned),
                Series("held-out reward model", held_out),
                Series("best of n", best),
            ],
            "square root of the KL from the reference (nats per response)",
            "reward",
            "Reward against KL, by step",
        ),
        Lines(
            [
                Series("reward", [Point(i, float(v)) for i, v in enumerate(walk)]),
                Series("with a band", [Point(i * 50, estimate(-20 + 0.3 * i, 6)) for i in range(100)]),
            ],
            "optimizer step",
            "reward",
            "Reward by step, five thousand points and a hundred",
        ),
    ]


def _samples() -> Samples:
    return Samples(
        ["before", "after"],
        [
            Sample(
                "Sample 1, drawn by seed 0",
                "How do I get candle wax out of a tablecloth?",
                [
                    SampleText(
                        "Wax is a solid. It is on the cloth.", [("reward", -0.412), ("tokens", 12), ("ended", True)]
                    ),
                    SampleText(
                        "Let the wax harden, then lift off what you can with a blunt knife. Lay brown paper over the "
                        "rest and go over it with a warm iron; the paper takes up the wax. Wash as usual.",
                        [("reward", 1.873), ("tokens", 48), ("ended", True)],
                    ),
                ],
            ),
            Sample(
                "Sample 2, texts that attack the page: <b>",
                HOSTILE,
                [SampleText(HOSTILE, [("flag", "<i>odd</i>")]), None],
            ),
            Sample("Sample 3, long ones", "w" * 500, [SampleText(LONG_WORD), SampleText(BOOK, [("tokens", 100_000)])]),
            Sample("Sample 4, nothing", "", [SampleText("", [("reward", None)]), SampleText(" \n ", [("tokens", 0)])]),
        ],
        "Ten by seed, the largest gains and losses; never picked by hand",
    )


def _odd(draw: np.random.Generator) -> list:
    one = [Point(3, 0.7, "the only step")]
    wide = [-1e6, 2.5e5, 1.2e6, math.inf, math.nan]
    return [
        Verdicts([]),
        Table(["a", "b"], [], "A table without rows"),
        Table([f"column {i}" for i in range(14)], [[f"cell {i}" for i in range(14)]], "A table wider than a telephone"),
        Bars([], "pairs", "Bars without rows"),
        Bars([BarGroup("", [Bar("the only one", estimate(0.4, 0.1))])], "pairs", "One bar"),
        Bars([BarGroup("", [Bar("nothing known", None)])], "pairs", "Nothing measured"),
        Histogram([Distribution("chosen", []), Distribution("rejected", [])], "reward", "responses", "No values"),
        Histogram([Distribution("equal", [3.0] * 20)], "reward", "responses", "Equal values"),
        Histogram(
            [Distribution(f"series {i}", list(draw.normal(2 * i, 1, 150)) + wide[3:]) for i in range(4)],
            "reward",
            "responses",
            "Four series, two values not finite",
        ),
        Histogram(
            [Distribution("heavy tails", list(draw.standard_cauchy(500) * 1e4))], "reward", "responses", "Heavy tails"
        ),
        Lines([], "step", "reward", "No series"),
        Lines([Series("empty", [])], "step", "reward", "An empty series"),
        Lines([Series("one", one)], "step", "reward", "One point"),
        Lines([Series("flat", [Point(i, 5.0) for i in range(4)]), Series("empty", [])], "step", "loss", "Constant"),
        Lines(
            [Series("wild", [Point(i, v) for i, v in enumerate(wide)])], "step", "reward", "Huge values, and two gaps"
        ),
        Lines([Series("tiny", [Point(i * 1e-7, i * 1e-9) for i in range(4)])], "rate", "loss", "Tiny values"),
        Lines(
            [
                Series(f"crowd {k}", [Point(1 + i / 90, 1 + k / 50, f"label {k}.{i}") for i in range(9)])
                for k in range(4)
            ],
            "step",
            "reward",
            "Labels that cannot all have room",
        ),
        Samples(["a", "b"], [Sample("Two columns", "p", [SampleText("one " * 60)] * 2)], "Two columns"),
        Samples(["a"], [], "No samples"),
    ]
