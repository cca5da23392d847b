"""Texts that were read in another encoding than they were written in, and good ones that look nearly so."""

import pytest

from chatlora.reading.encoding import wrong_encoding

MISREAD = [
    ("你好，世界。", "utf-8", "cp1252"),
    ("你好，世界", "utf-8", "latin-1"),
    ("你好，我想去北京。", "gb18030", "latin-1"),
    ("你好，我想去北京。", "gb18030", "utf-8"),
    ("你好世界很好看", "utf-8", "gb18030"),
    ("こんにちは", "utf-8", "cp932"),
    ("café", "utf-8", "cp1252"),
    ("naïve", "utf-8", "latin-1"),
    ("CAFÉ", "utf-8", "cp1252"),
    ("it’s", "utf-8", "cp1252"),
    ("it’s", "cp1252", "latin-1"),
    ("5 £", "utf-8", "latin-1"),
    ("привет", "utf-8", "cp1251"),
    ("привет", "utf-8", "cp1252"),
    ("ελληνικά", "utf-8", "cp1252"),
    ("😀", "utf-8", "cp1252"),
]


@pytest.mark.parametrize(("text", "written", "read"), MISREAD)
def test_signs_are_seen(text: str, written: str, read: str) -> None:
    found = wrong_encoding(f"She said: {text.encode(written).decode(read, 'replace')} and left, long ago.")
    assert found
    assert len(found) < 40
    assert wrong_encoding(text) is None


@pytest.mark.parametrize("text", ["锟斤拷", "a\ufffd", "\x08eta", "don\x92t", "\ufffd" * 9])
def test_what_no_text_has_is_a_sign(text: str) -> None:
    assert wrong_encoding(text)


@pytest.mark.parametrize(
    "text",
    [
        "AMANHÃ… “IRMÃ” SÃO PAULO, ação",
        "«\xa0bébé\xa0» «\xa0été\xa0»",
        "Ünïcödé, Ä–Ö–Ü, 100°C £5 §3 ½",
        "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏ àáâãäåæçèéêë",
        "Việt Nam ÂM NHẠC",
        "联通 該頁碼小於 1，「很好」——《红楼梦》……",
        "日本語の文章です。カタカナ",
        "Привет, мир №5 — «да»",
        "😀👩‍👩‍👧 e\u0301 \u200b",
        "\x1b[31mred\x1b[0m\t\r\n\x0c",
    ],
)
def test_good_text_shows_none(text: str) -> None:
    assert wrong_encoding(text) is None
