"""The text preprocessing that the models were trained with (that of DeepFloyd's T5 prompts)."""

from __future__ import annotations

import html
import re
import urllib.parse
import warnings

import ftfy
from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning

DOMAINS = "com|co|ru|net|org|edu|gov|it"
FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
DASHES = (
    "\\u002D\\u058A\\u05BE\\u1400\\u1806\\u2010-\\u2015\\u2E17\\u2E1A\\u2E3A\\u2E3B\\u2E40"
    "\\u301C\\u3030\\u30A0\\uFE31\\uFE32\\uFE58\\uFE63\\uFF0D"
)
HYPHEN = re.compile("[-_]")
MOST_HYPHENS = 3  # with more, hyphens stand for spaces


def _compiled(*rules: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


LINKS = _compiled(
    ("<person>", "person"),
    *(
        (
            rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:{DOMAINS})[\w/-]*\b/?(?!@))",
            "",
        )
        for scheme in ("https?", "www")
    ),
)

SYMBOLS = _compiled(
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # strokes, phonetic extensions, enclosed letters, ideographs, hexagrams
    (f"[{DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{FILE_TYPES})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\][}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)

WORDS = _compiled(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # codes of letters and digits
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FILE_TYPES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(caption: str) -> str:
    """A prompt as the text encoder got it in training: the cleaning runs twice.

    Lower-cases, drops links, markup, nicknames, ideographs, file names, codes and long numbers, unifies dashes and
    quotes, repairs broken encodings. A prompt of ideographs alone becomes empty.
    """
    return _clean_once(_clean_once(caption))


def _clean_once(caption: str) -> str:
    caption = _apply(LINKS, urllib.parse.unquote_plus(caption).strip().lower())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)  # a short prompt may look like a file name
        caption = BeautifulSoup(caption, features="html.parser").text
    caption = _apply(SYMBOLS, caption)
    if len(HYPHEN.findall(caption)) > MOST_HYPHENS:
        caption = HYPHEN.sub(" ", caption)
    caption = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
    return _apply(WORDS, caption).strip()


def _apply(rules: list[tuple[re.Pattern[str], str]], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
