"""Chat templates in processes of their own."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway import rendering
from sfllm_gateway.prompt import ContentForm, PromptTemplate
from sfllm_gateway.rendering import ChatTemplate, RenderPool

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ECHO = "{{ messages[0].content }}"


@pytest.fixture
async def pool() -> AsyncIterator[RenderPool]:
    made = RenderPool()
    yield made
    await made.close()


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def renderers() -> list[psutil.Process]:
    """The processes that render for this one."""
    children = psutil.Process().children()
    return [child for child in children if "sfllm_gateway.render_process" in child.cmdline()]


async def test_every_request_gets_its_own_prompt(pool: RenderPool) -> None:
    template = ChatTemplate(pool, ECHO, {})
    texts = [f"text {number} €" * number for number in range(50)]
    assert await asyncio.gather(*(template.render(user(text)) for text in texts)) == texts


async def test_a_request_that_is_given_up_does_not_mix_up_the_next(pool: RenderPool) -> None:
    template = ChatTemplate(pool, ECHO, {})
    for number in range(5):
        task = asyncio.create_task(template.render(user("given up" * 1000)))
        await asyncio.sleep(0)
        task.cancel()
        assert await template.render(user(str(number))) == str(number)


async def test_a_process_that_dies_is_replaced(pool: RenderPool) -> None:
    template = ChatTemplate(pool, ECHO, {})
    assert await template.render(user("a")) == "a"
    for process in renderers():
        process.kill()
    with pytest.raises(ServiceError) as refused:
        await template.render(user("b"))
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert await template.render(user("c")) == "c"


async def test_a_template_that_takes_too_long_is_killed(
    pool: RenderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "RENDER_SECONDS", 0.2)
    with pytest.raises(ServiceError, match="takes longer"):
        await ChatTemplate(pool, ENDLESS, {}).render(user("a"))
    assert not renderers()
    assert await ChatTemplate(pool, ECHO, {}).render(user("b")) == "b"


async def test_closing_leaves_no_process() -> None:
    pool = RenderPool()
    await ChatTemplate(pool, ECHO, {}).render(user("a"))
    assert renderers()
    await pool.close()
    assert not renderers()


def test_the_processes_end_with_a_gateway_that_is_killed() -> None:
    scheduler = FakeScheduler()
    gateway = GatewayProcess(scheduler)
    gateway.wait_ready()
    children = psutil.Process(gateway.process.pid).children()
    assert children
    gateway.process.send_signal(signal.SIGKILL)
    gateway.process.wait(10)
    assert psutil.wait_procs(children, timeout=10)[1] == []
    scheduler.close()


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("{{ m.content }}", ContentForm.TEXT),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", ContentForm.TEXT),
        ("{% for p in m.content %}{{ p.text }}{% endfor %}", ContentForm.PARTS),
        ("{% for p in m['content'] %}{{ p.text }}{% endfor %}", ContentForm.PARTS),
        (
            "{% if m.content is string %}x{% else %}{% for p in m.content %}{% endfor %}{% endif %}",
            ContentForm.EITHER,
        ),
    ],
)
def test_what_content_a_template_takes_shows_in_its_source(source: str, form: ContentForm) -> None:
    assert PromptTemplate(source, {}).content is form


def test_a_template_that_takes_either_gets_what_the_client_sent() -> None:
    source = (
        "{% for m in messages %}{% if m.content is string %}<{{ m.content }}>{% else %}"
        "{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}"
    )
    messages = [*user("a"), {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    assert PromptTemplate(source, {}).render(messages) == "<a>[b]"
