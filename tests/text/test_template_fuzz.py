"""Random templates: each renders as transformers renders it, or is a `ChatTemplateError`, soon."""

import random
import time

import pytest
from tiny_text import build_backend
from transformers.utils.chat_template_utils import render_jinja_template

from falcon_h1r.text import ChatTemplateError, Tokenizer
from falcon_h1r.text import meter as limits

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "é <1+1>?\n'q' 😀"},
    {"role": "assistant", "content": "2", "tool_calls": [{"name": "f", "arguments": {"a": [1]}}]},
]
FILTERS = """abs attr('x') batch({i}) capitalize center({i}) count default({e}) dictsort e escape
    filesizeformat first float forceescape format({e}) groupby('role') indent({e}) int items
    join({e}) last length list list lower map('{f}') map(attribute='content') max min pprint
    reject('{t}') rejectattr('role','equalto',{e}) replace({e},{e}) reverse round({i}) safe
    select('{t}') selectattr('role') slice({i}) sort string striptags sum sum(start={e}) title
    tojson tojson(indent={i}) trim trim({e}) truncate({i}) unique upper urlencode urlize wordcount
    wordwrap({i}) xmlattr""".split()
METHODS = """center({i}) count({e}) encode() endswith({e}) expandtabs({i}) find({e}) format({e},{e})
    format(x={e}) format_map({e}) get({e}) get('role',{e}) index({e}) isdigit() items() join({e})
    keys() ljust({i}) lower() lstrip({e}) partition({e}) replace({e},{e}) rfind({e}) rindex({e})
    rjust({i}) rpartition({e}) rsplit({e}) rsplit({e},{i}) rstrip() split() split({e}) splitlines()
    startswith({e}) strip({e}) title() to_bytes({i},'big') translate({e}) upper() values()
    zfill({i}) append({e}) pop() update({e}) __class__ bit_length() as_integer_ratio() hex() copy()
    fromkeys({e}) isdisjoint({e}) maketrans({e},{e}) removeprefix({e}) swapcase() casefold()
    decode()""".split()
TESTS = """boolean defined even mapping none number odd sequence string undefined lower
    in({e})""".split()
ATOMS = """messages messages[0] messages[-1].content messages[1]['content'] tools bos_token
    add_generation_prompt nothing none true 0 1 2 -3 1.5 9999 100000 10000000 1000000000 0xffff
    'a' '' '{{}}' '{{:>99}}' '%s' '%5d%%' '%(a)s' '\\ud800' '\\u0000' 'x-y_z' ',' '\\n' [] {{}} (1,)
    [1,2,'a'] {{'a':1,'role':'b'}} range(9) range(99999) ns.a ns.s ns.n x m({e}) loop.index
    loop.last loop cycler(1,{e}).next() joiner()() dict(a={e}) self caller""".split()
BINARY = [*"+ - * / // % ** ~ == != < <= > >= and or in".split(), "not in"]


class Writer:
    """Templates of a grammar, grown at random."""

    def __init__(self, seed: int):
        self.r = random.Random(seed)

    def fill(self, form: str, depth: int) -> str:
        number = self.r.choice(["1", "2", "3", "7", "99", "-5", "1000000000", "10**9", "ns.n"])
        plain = self.r.choice("upper lower trim string length list first tojson".split())
        test = self.r.choice("defined string none number".split())
        while "{e}" in form:
            form = form.replace("{e}", self.expression(depth + 1), 1)
        form = form.replace("{i}", number).replace("{f}", plain).replace("{t}", test)
        return form.replace("{{", "{").replace("}}", "}")

    def expression(self, depth: int = 0) -> str:
        r = self.r
        kind = r.randrange(10) if depth < 5 else 0
        if kind <= 2:
            return self.fill(r.choice(ATOMS), depth)
        value = self.expression(depth + 1)
        if kind <= 5:
            return f"({value}) | {self.fill(r.choice(FILTERS), depth)}"
        if kind == 6:
            return f"({value}).{self.fill(r.choice(METHODS), depth)}"
        if kind == 7:
            return f"(({value}) {r.choice(BINARY)} ({self.expression(depth + 1)}))"
        if kind == 8:
            return f"({value})[{r.choice(['0', '-1', '1:', '::-1', self.expression(depth + 1)])}]"
        test = self.fill(r.choice(TESTS), depth)
        return r.choice([f"[{value}, {value}]", f"({value}) is {test}", f"{{'k': {value}}}"])

    def statement(self, depth: int = 0) -> str:
        r = self.r
        kind = r.randrange(9) if depth < 3 else 0
        value = self.expression(2)
        if kind <= 2:
            return f"{{{{ {value} }}}}"
        body = "".join(self.statement(depth + 1) for _ in range(r.randrange(1, 3)))
        if kind == 3:
            over = r.choice(["messages", "range(3)", "range(99999)", "'ab'", value])
            guard = r.choice(["", "", f" if {self.expression(3)}", " recursive"])
            stop = r.choice(["", "{% break %}", f"{{% if {value} %}}{{% continue %}}{{% endif %}}"])
            return f"{{% for x in {over}{guard} %}}{body}{stop}{{% else %}}-{{% endfor %}}"
        if kind == 4:
            return f"{{% if {value} %}}{body}{{% elif {self.expression(3)} %}}y{{% endif %}}"
        if kind == 5:
            name = r.choice(["x", "ns.a", "ns.s", "ns.n"])
            grown = r.choice([value, f"[{name}, {name}]", f"{name} ~ {name}", f"{name} * 99"])
            return f"{{% set {name} = {grown} %}}"
        if kind == 6:
            return f"{{% macro m(x) %}}{body}{{% endmacro %}}"
        if kind == 7:
            return f"{{% set x %}}{body}{{% endset %}}"
        forms = (
            f"{{% filter {self.fill(r.choice(FILTERS), 4)} %}}{body}{{% endfilter %}}",
            f"{{% generation %}}{body}{{% endgeneration %}}\n",
            f"{{% call m({value}) %}}{body}{{% endcall %}}",
            "{% endfor %}",
            "{{",
        )
        return r.choice(forms)

    def template(self) -> str:
        first = "{% set ns = namespace(a=[1], s='ab', n=3) %}"
        return first + " \n".join(self.statement() for _ in range(self.r.randrange(1, 5)))


# What prints an address or the name of a class.
UNEQUAL = ("generator", "namespace", " at 0x", "iterator", "<class")


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("cases", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_templates_render_as_in_transformers_or_are_refused(monkeypatch, capsys, cases):
    monkeypatch.setattr(limits, "MOST_SECONDS", 0.3)
    backend, rendered, limited, alone, hangs = build_backend(), 0, 0, 0, 0
    unequal = []
    for seed in range(cases):
        source = Writer(seed).template()
        tokenizer = Tokenizer(backend, chat_templates={"default": source})
        start = time.process_time()
        try:
            text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)
        except ChatTemplateError as error:
            assert "\n" not in str(error)
            limited += isinstance(error.__cause__, limits.TooMuch)
            continue
        finally:
            hangs += time.process_time() - start > 10
        rendered += 1
        try:
            ((expected,), _) = render_jinja_template([MESSAGES], chat_template=source)
        except Exception:  # it computes constants that are never reached
            alone += 1
            continue
        if expected != text and not any(mark in expected.lower() for mark in UNEQUAL):
            unequal.append(seed)
    with capsys.disabled():
        failed = cases - rendered - limited
        print(
            f"\n{cases} templates: {rendered} rendered, {failed} failed, {limited} beyond a limit, "
            f"{hangs} took over 10 s, {len(unequal)} unlike transformers', {alone} fail there"
        )
    assert not hangs and not unequal and alone <= cases // 100
    assert rendered > cases // 10 and limited > cases // 100
