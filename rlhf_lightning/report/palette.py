"""Colours of the page, light and dark: blue and orange first, which every form of colour blindness tells apart.

Text against `page` and `panel` has a contrast of at least 4.5, marks of data against `page` of at least 3 (WCAG 2.2,
1.4.3 and 1.4.11); the tests compute it.
"""

LIGHT = {
    "page": "#ffffff",
    "panel": "#f4f6f8",
    "ink": "#18212b",
    "muted": "#566270",
    "rule": "#dde2e7",
    "grid": "#e8ecf0",
    "axis": "#8894a1",
    "link": "#0b5cab",
    "good": "#14692f",
    "bad": "#b3261e",
    "warn": "#b7791f",
    "bar": "#5b93cc",
    "s0": "#1a66b3",
    "s1": "#c2500a",
    "s2": "#0d7f6d",
    "s3": "#8a3fa0",
}

DARK = {
    "page": "#12161b",
    "panel": "#1b2128",
    "ink": "#e6eaee",
    "muted": "#a3aebb",
    "rule": "#303842",
    "grid": "#262d36",
    "axis": "#6d7986",
    "link": "#82b8f0",
    "good": "#6cd58b",
    "bad": "#ff938a",
    "warn": "#e0a94a",
    "bar": "#3f76b0",
    "s0": "#6cb0f5",
    "s1": "#f5a04c",
    "s2": "#4fd0b8",
    "s3": "#d09be6",
}
