"""The page, as an application that a server of HTTP can serve: its tabs, its looks, and what ends with a visitor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Mount

from slowllm.entrypoints.web import tabs
from slowllm.entrypoints.web.bodies import MAX_BODY_BYTES, BoundedBodies
from slowllm.entrypoints.web.desk import Desk
from slowllm.entrypoints.web.files import MAX_UPLOAD_BYTES
from slowllm.entrypoints.web.machine import MachineView
from slowllm.entrypoints.web.words import paragraph
from slowllm.html import escaped

# How often the tab of the machine is renewed while it is looked at.
_RENEW_SECONDS = 1.0
_FONTS = ("ui-sans-serif", "system-ui", "sans-serif")
_MONO_FONTS = ("ui-monospace", "monospace")


def page_app(desk: Desk, machine: MachineView, folder: Path) -> tuple[BoundedBodies, Callable[[], None]]:
    """Return the application, and what ends its streams to browsers, to be called in its event loop.

    Args:
        desk: to which visitors come.
        machine: that the last tab shows.
        folder: in which results are written, inside of Gradio's own.
    """
    # No title of an API, and none of FastAPI's own pages, which load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # Fonts of the browser's machine, so that none are loaded.
    theme = gr.themes.Default(font=_FONTS, font_mono=_MONO_FONTS)
    gr.mount_gradio_app(
        app, _blocks(desk, machine, folder), "/", footer_links=[], run_history=False, allowed_paths=[str(folder)],
        show_error=True, max_file_size=MAX_UPLOAD_BYTES, ssr_mode=False, enable_monitoring=False, pwa=False,
        mcp_server=False, theme=theme, css_paths=[Path(__file__).with_name("page.css")],
    )  # fmt: skip
    (mounted,) = (route.app for route in app.routes if isinstance(route, Mount))
    return BoundedBodies(app, MAX_BODY_BYTES), cast(gr.routes.App, mounted).stop_event.set


def _blocks(desk: Desk, machine: MachineView, folder: Path) -> gr.Blocks:
    name = desk.lm.name
    with (
        gr.Blocks(analytics_enabled=False, title=f"slowllm: {name}") as blocks,
        gr.Column(elem_classes="slowllm"),
    ):
        gr.HTML(
            f'<p class="title">{escaped(name)}</p>'
            + paragraph("All visitors share the sweeps over the weights; each token takes one.", "subtitle")
        )
        others = []
        with gr.Tabs():
            for label, fill in (
                ("Complete", tabs.complete_tab),
                ("Score", tabs.score_tab),
                ("Choose", tabs.choose_tab),
                ("Yes or no", tabs.yes_no_tab),
                ("File", functools.partial(tabs.file_tab, folder=folder)),
            ):
                with gr.Tab(label) as tab:
                    fill(desk)
                others.append(tab)
            with gr.Tab("Machine") as tab:
                timer = _machine_tab(machine)
            quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
            tab.select(lambda: gr.Timer(active=True), None, timer, **quick)
            for other in others:
                other.select(lambda: gr.Timer(active=False), None, timer, **quick)
        # Without a limit: waiting coroutines cost nothing, and the service itself says who waits.
        blocks.queue(default_concurrency_limit=None, api_open=False)
        blocks.unload(_left(desk))
    return cast(gr.Blocks, blocks)  # entering it makes it anything


def _left(desk: Desk) -> Any:
    def left(request: gr.Request) -> None:
        desk.leave(str(request.session_hash))

    return left


def _machine_tab(machine: MachineView) -> gr.Timer:
    """Fill the tab; return what renews it while it is looked at."""

    def renewed(request: gr.Request) -> str:
        return machine.live_html(str(request.session_hash))

    live = gr.HTML(machine.live_html(""), elem_id="machine-live")
    gr.HTML(machine.plan_html(), elem_id="machine-plan")
    timer = gr.Timer(_RENEW_SECONDS, active=False)
    timer.tick(renewed, None, live, queue=False, api_visibility="private", show_progress="hidden")
    return timer
