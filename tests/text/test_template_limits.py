"""Templates that fail or never end: each is a `ChatTemplateError`, soon and in little memory."""

import threading

import pytest
from tiny_text import FAULTY_TEMPLATE, build_backend

from falcon_h1r.text import ChatTemplateError, Tokenizer, sandbox, template
from falcon_h1r.text import meter as limits

USER = {"role": "user", "content": "1+1?"}


def render(source, messages=(USER,), **options) -> str:
    tokenizer = Tokenizer(build_backend(), chat_templates={"default": source})
    return tokenizer.apply_chat_template(list(messages), **options)


def refused(source, *args, **options) -> str:
    with pytest.raises(ChatTemplateError) as error:
        render(source, *args, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    message.encode()
    return message


FAILING = {
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{{ 1 % 0 }}": "ZeroDivisionError",
    "{{ 2.0 ** 100000 }}": "OverflowError",
    "{{ range(10 ** 9) }}": "OverflowError: Range too big",
    "{{ range(10 ** 30) }}": "OverflowError",
    "{{ {}.popitem() }}": "unsafe",
    "{{ '{missing}'.format() }}": "KeyError: 'missing'",
    "{{ '{}'.format() }}": "IndexError",
    "{{ [].index(1) }}": "ValueError",
    "{{ ''.index('a') }}": "ValueError: substring not found",
    "{{ [] | first + 1 }}": "No first item",
    "{{ nothing.here }}": "'nothing' is undefined",
    "{{ nothing() }}": "'nothing' is undefined",
    "{{ messages[5].role }}": "no element 5",
    "{{ 'x' | no_such_filter }}": "No filter named 'no_such_filter'",
    "{{ 'x' is no_such_test }}": "No test named 'no_such_test'",
    "{% nothing %}": "line 1: Encountered unknown tag",
    "{{ 'a' + 1 }}": "TypeError",
    "{{ [1, 'a'] | sort }}": "TypeError",
    "{{ 'ab' | int('x') + 1 }}": "TypeError",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
    "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns.x.y.z }}": "no attribute 'y'",
    "{% for a, b in [1] %}{% endfor %}": "TypeError",
    "{% for a, b in ['abc'] %}{% endfor %}": "ValueError: too many values",
    "{% include 'x' %}": "TypeError: no loader",
    "{% import 'x' as y %}": "TypeError: no loader",
    "{% extends 'x' %}": "TypeError: no loader",
    "{{ raise_exception('no\n' * 1000) }}": "chat template: no no no",
    "{{ raise_exception('\\ud800') }}": r"\ud800",
    "{{ '\\ud800' }}": "its output is no UTF-8 text: the lone surrogate U+D800 at character 0",
    "{{ '(' * 500 }}{{ " + "(" * 500 + ")" * 500 + " }}": "Error",
    "{{ " + "-" * 3000 + "1 }}": "Error",
    "{{ 1" + " + 1" * 3000 + " }}": "Error",
    "{% if 1 %}" * 200 + "{% endif %}" * 200: "Error",
    "{% for i in 'a' %}" * 30 + "{% endfor %}" * 30: "Error",
    "{{ 0x" + "f" * 20000 + " }}": "ValueError",
    "{{ " + "9" * 5000 + " }}": "ValueError",
    "{{ {}[10 ** 4500] + 1 }}": "chat template: ",
    "{% break %}": "SyntaxError",
    "{{ 'x'.encode('punycode') }}": "the codec 'punycode'",
    "{{ strftime_now('%Y' * 5000) }}": "more than 1000 characters",
    "{{ lipsum(1) }}": "'lipsum' is undefined",
    "{{ loop.index }}": "undefined",
    "{{ messages | tojson(5, 6, 7, 8, 9, 10) }}": "TypeError",
    "{{ '%d' % 'x' }}": "TypeError",
    "{{ '%(a)s' % {} }}": "KeyError",
}


@pytest.mark.parametrize("source", FAILING, ids=lambda source: source[:40])
def test_every_error_is_a_template_error_with_its_words(source):
    assert FAILING[source] in refused(source)


@pytest.mark.parametrize("source", [None, 5, b"x", ["a"], {"a": 1}])
def test_a_template_that_is_no_string_is_refused(source):
    assert "expected a string" in refused(source)


NS = "{% set ns = namespace(a=[1], s='ab', t=(1,), m='') %}"
LONG = NS + "{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
WIDE = NS + "{% set s = 'ab' * 4999999 %}{% set w = [s] * 100000 %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}"
DONE = "{% endfor %}{% endfor %}"
ENDLESS = [
    "{{ 9 ** 9999999 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ (2 ** 60000) ** 60000 }}",
    NS + "{% set ns.n = 3 %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ '{:.1000000000f}'.format(1.5) }}",
    "{{ '{x:>1000000000}'.format_map({'x': 1}) }}",
    "{{ ('{0}' * 99999).format('x' * 9999999) }}",
    "{{ '%1000000000d' % 5 }}",
    "{{ '%" + "0" * 60 + "1000000000d' % 5 }}",
    "{{ '%((a))1000000000d' % {'(a)': 1} }}",
    "{{ '%*d' % (1000000000, 5) }}",
    "{{ '%.1000000000f' % 5 }}",
    "{{ ('%(a)s' * 99999) % {'a': 'x' * 99999} }}",
    "{{ '%1000000000d' | format(5) }}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ 10 ** 9 * 'a' }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ (0,) * 10 ** 9 }}",
    "{{ 'a'.encode() * 10 ** 9 }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a'.center(1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a'.rjust(width=1000000000) if false else 'a'.zfill(1000000000) }}",
    "{{ 'a\tb'.expandtabs(1000000000) }}",
    "{{ 'a\nb' | indent(1000000000) }}",
    "{{ ('\n' * 9999) | indent('x' * 99999) }}",
    "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "{{ ('x' * 99999).replace('', 'y' * 99999) }}",
    "{{ ('x' * 9999999).join(['a'] * 99999) }}",
    "{{ ['a'] * 99999 | join('x' * 9999999) }}",
    "{{ (['a'] * 99999) | join('x' * 9999999) }}",
    "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "{{ (5).to_bytes(1000000000, 'big') }}",
    "{{ [1] | batch(1000000000, 'x') | list }}",
    "{{ [1] | slice(1000000000) | list }}",
    "{{ 1 | round(1000000000, 'ceil') }}",
    "{{ 5 | round(-1000000000) }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{{ ([[1]] * 99999) | tojson(indent='x' * 99999) }}",
    "{{ [1, 2, 3] | tojson(separators=('x' * 9999999, 'y')) }}",
    "{{ ([[1] * 99] * 999) | sum(start=[]) | sum(start=0) }}" + LOOPS + DONE,
    "{{ ([[1] * 999] * 9999) | sum(start=[]) | length }}",
    "{{ ('a' * 4999999).rfind('ab' + 'a' * 2499999) }}",
    "{{ ('a' * 4999999).strip('b' * 4999999 + 'a') | length }}",
    "{{ ('a' * 4999999) | trim('b' * 4999999 + 'a') | length }}",
    "{{ ('(' * 99999 + ')' * 99999) | urlize }}",
    "{{ ('a-' * 99999) | wordwrap(1) }}",
    "{{ ([[1] * 99999] * 9) | pprint }}",
    "{{ range(99999) | map('string') | map('center', 99999) | list | length }}",
    "{{ range(99999) | map(attribute='x' ~ '.x' * 99999) | list | length }}",
    "{{ ('a' * 2999999) | list | map('list') | map('list') | list | length }}" + LOOPS + DONE,
    LOOPS + DONE,
    LOOPS + "a" + DONE,
    LOOPS + "{{ i }}" + DONE,
    "{% set x %}" + LOOPS + "aaaaaaaaaaaa" + DONE + "{% endset %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for x in [[]] recursive %}{{ loop([x, x, x]) }}{% endfor %}",
    "{% for i in range(99999) if messages | tojson | length < 0 %}{% endfor %}" * 99,
    NS + "{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    NS + "{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    NS + "{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    NS + "{% for i in range(99) %}{% set ns.a = ns.a * 99 %}{% endfor %}{{ ns.a }}",
    NS + "{% for i in range(99) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    NS + "{% for i in range(99999) %}{% set ns.a = ns.a + ['x' * 999999 ~ i] %}{% endfor %}",
    NS + "{% for i in range(99999) %}{% set ns.a = ns.a + ['x' * 999999] %}{% endfor %}",
    NS + "{% for i in range(9999) %}{% set ns.a = [ns.a] %}{% endfor %}{{ ns.a }}",
    NS + "{% for i in range(99999) %}{% set ns.t = (ns.t, i) %}{% endfor %}{{ {ns.t: 1} }}",
    LONG + "{{ ns.a }}",
    LONG + "{{ ns.a ~ '' }}",
    LONG + "{{ ns.a | string | length }}",
    LONG + "{{ ns.a | tojson }}",
    LONG + "{{ ns.a | pprint }}",
    LONG + "{{ ns.a | safe }}",
    LONG + "{{ [ns.a] | join }}",
    LONG + "{{ '%s' % ns.a }}",
    LONG + "{{ '%s' % (ns.a,) }}",
    LONG + "{{ '{}'.format(ns.a) }}",
    LONG + "{{ '{0.a!r}'.format(ns) }}",
    LONG + "{{ {'x': ns.a}.values() }}",
    LONG + "{% set b = ns.a %}" + LONG + "{{ ns.a == b }}",
    LONG + "{% set b = ns.a %}" + LONG + "{{ ns.a in [b] }}",
    LONG + "{% set b = ns.a %}" + LONG + "{{ ns.a is eq b }}",
    LONG + "{% set b = ns.a %}" + LONG + "{{ [ns.a].index(b) }}",
    LONG + "{% set b = ns.a %}" + LONG + "{{ [ns.a, b] | sort }}",
    LONG + "{% set b = ns.a %}" + LONG + "{{ [ns.a, b] | min }}",
    LONG + "{{ raise_exception(ns.a) }}",
    LONG.replace("[ns.a, ns.a]", "(ns.a, ns.a)") + "{{ {ns.a: 1} | length }}",
    LONG.replace("[ns.a, ns.a]", "(ns.a, ns.a)") + "{{ {}[ns.a] }}",
    LONG.replace("[ns.a, ns.a]", "(ns.a, ns.a)") + "{{ ns.a in {} }}",
    LONG.replace("[ns.a, ns.a]", "(ns.a, ns.a)") + "{{ {}.get(ns.a) }}",
    LONG.replace("[ns.a, ns.a]", "(ns.a, ns.a)") + "{{ [ns.a] | unique | list }}",
    LONG.replace("[ns.a, ns.a]", "{'a': ns.a, 'b': ns.a}") + "{{ ns.a }}",
    LONG.replace("[ns.a, ns.a]", "namespace(a=ns.a, b=[ns.a, ns.a]).b") + "{{ ns.a }}",
    LONG.replace("[ns.a, ns.a]", "(ns.a, ns.a)") + "{{ dict([(ns.a, 1)]) | length }}",
    LONG.replace("[ns.a, ns.a]", "(ns.a, ns.a)") + "{{ dict([(ns.a, 1)] | select) | length }}",
    LONG.replace("[ns.a, ns.a]", "(ns.a, ns.a)") + "{{ namespace([(ns.a, 1)]) }}",
    LONG.replace("[ns.a, ns.a]", "(ns.a, ns.a)") + "{{ {}.fromkeys([ns.a]) | length }}",
    LONG + "{% set b = ns.a %}" + LONG + "{{ [b] | selectattr('x', 'eq', ns.a) | list }}",
    LONG + "{% set b = ns.a %}" + LONG + "{{ [b] | select('eq', ns.a) | list }}",
    LONG + "{% set b = ns.a %}" + LONG + "{{ ns.a in ([b] | select) }}",
    WIDE + "{{ (w | map('upper') | select | join) }}",
    WIDE + "{{ [['k', s]] * 99999 | select | urlencode }}",
    WIDE + "{{ ([['k', s]] * 99999) | select | urlencode }}",
    WIDE + "{{ w | sort | length }}",
    WIDE + "{{ w | map('upper') | unique | list | length }}",
    WIDE + "{{ w | map('upper') | list | length }}",
    WIDE + "{{ w | join | length }}",
    WIDE + "{{ ''.join(w) }}",
    WIDE + "{{ w == w[:-1] + ['b'] }}",
    WIDE + "{% for x in w %}{% set ns.m = x[1:] %}{% endfor %}",
    "{{ " + "a," * 5000 + " }}",
    "{{ x.y.z }}" * 1000,
    "x" * 100_001,
]  # fmt: skip


@pytest.mark.parametrize("source", ENDLESS, ids=lambda source: source[-60:].replace("\n", " "))
def test_what_would_never_end_is_refused(monkeypatch, source):
    monkeypatch.setattr(limits, "MOST_SECONDS", 0.1)
    monkeypatch.setattr(limits, "MOST_CHARACTERS", 10**6)
    monkeypatch.setattr(sandbox, "MOST_NODES", 2000)
    assert "chat template" in refused(source)


def test_output_and_characters_have_a_limit(monkeypatch):
    monkeypatch.setattr(template, "MOST_CHARACTERS", 10)
    assert render("{% for i in range(10) %}x{% endfor %}") == "x" * 10
    assert "its output has more than 10 characters" in refused(
        "{% for i in range(11) %}x{% endfor %}"
    )


def test_the_limits_hold_in_threads_each_with_its_own_meter(monkeypatch):
    monkeypatch.setattr(limits, "MOST_BYTES", 2**20)
    source = "{% for m in messages %}{{ m.content * 1000 }}{% endfor %}"
    tokenizer = Tokenizer(build_backend(), chat_templates={"default": source})
    found = {}

    def work(name: int) -> None:
        try:
            found[name] = tokenizer.apply_chat_template([USER] * (50 if name % 2 else 500))
        except ChatTemplateError as error:
            found[name] = str(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[name] == USER["content"] * 50_000 for name in (1, 3, 5, 7))
    assert all("makes values of more than 1048576 bytes" in found[name] for name in (0, 2, 4, 6))


def test_a_long_conversation_is_far_from_the_limits():
    messages = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "é"}]
    text = render(FAULTY_TEMPLATE, messages * 500)
    assert len(text) > 500_000


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([{"role": "user", "content": "a\ud800"}], r"messages\[0\]\['content'\] is no UTF-8 text"),
        ([{"role": "\udcff"}], r"messages\[0\]\['role'\] is no UTF-8 text: byte 0xff"),
        ([{"role": "user", "content": ["\ud800"]}], "its output is no UTF-8 text"),
    ],
)
def test_messages_that_are_no_text_are_refused_by_name(messages, found):
    with pytest.raises(ChatTemplateError, match=found):
        render("{{ messages[0].content[0] }}", messages)
