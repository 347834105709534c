"""Where everything stands on the page. What it does is in app; what it does by itself in the
browser, in page.js; how it looks, in style.css."""

from pathlib import Path
from typing import Any

from qwen2audio_core.chat import DEFAULT_SYSTEM
from qwen2audio_core.sampling import Settings
from qwen2audio_core.web.words import words

# A click on the cross of a waiting clip.
REMOVE_JS = """element.addEventListener('click', event => {
  const button = event.target.closest('[data-clip]');
  if (button) trigger('click', {clip: button.dataset.clip});
});"""
OPENED_JS = Path(__file__).with_name("page.js").read_text(encoding="utf-8")


def theme() -> Any:
    """Colours and fonts; the fonts are those of the reader's own system."""
    from gradio import themes

    system = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans CJK SC")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas")
    return themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=[*map(themes.Font, system), themes.Font("sans-serif")],
        font_mono=[*map(themes.Font, mono), themes.Font("monospace")],
    ).set(  # 4.5 to 1 and more on their grounds, WCAG 2.2
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


class Page:
    """The page's components, in English until the page is opened.

    settings  the model's own, where the sliders stand at first
    """

    def __init__(self, settings: Settings):
        import gradio as gr

        self.w = words("en")
        self.settings = settings
        with gr.Blocks(
            title="Qwen2-Audio", analytics_enabled=False, fill_width=True
        ) as self.blocks:
            # Kept by the browser alone; gradio wants a secret where there is none.
            self.chosen = gr.BrowserState("", storage_key="qwen2audio-language", secret="language")
            with gr.Row(elem_classes="q2a-top"):
                self.heading = gr.HTML(elem_classes="q2a-heading")
                self.language = gr.Button(size="sm", elem_id="q2a-language")
            with gr.Tabs():
                self.conversation_tab = gr.Tab(self.w["conversation"], id="conversation")
                self.inside_tab = gr.Tab(self.w["inside"], id="inside", elem_id="q2a-inside-tab")
            with self.conversation_tab, gr.Row(elem_classes="q2a-main"):
                with gr.Column(scale=3, min_width=300, elem_classes="q2a-talk"):
                    self._conversation(gr)
                    self._composer(gr)
                with gr.Column(scale=1, min_width=280, elem_classes="q2a-side"):
                    self._sound(gr)
                    self._settings(gr)
            with self.inside_tab:
                self.inside_hint = gr.HTML(elem_classes="q2a-hint")
                self.opened = gr.HTML(elem_id="q2a-inside")
                with gr.Row(elem_classes="q2a-actions"):
                    self.look = gr.Button(self.w["look"], elem_id="q2a-look", size="sm")
                self.progress = gr.HTML(elem_id="q2a-progress")
                self.report = gr.HTML(elem_id="q2a-report")

    def _conversation(self, gr: Any) -> None:
        self.chatbot = gr.Chatbot(
            show_label=False,
            elem_id="q2a-chat",
            height="auto",
            layout="bubble",
            buttons=["copy"],
            feedback_options=None,
            allow_tags=False,
            autoscroll=False,  # OPENED_JS does it
            render_markdown=False,  # what was typed and what was answered, to the letter
        )
        self.status = gr.HTML(elem_id="q2a-status")
        self.waiting = gr.HTML(elem_id="q2a-waiting", js_on_load=REMOVE_JS)

    def _composer(self, gr: Any) -> None:
        with gr.Row(elem_classes="q2a-compose"):
            self.text = gr.Textbox(
                label=self.w["text"],
                show_label=False,
                container=False,
                lines=1,
                max_lines=8,
                max_length=20_000,
                autofocus=True,
                scale=5,
                min_width=120,
                elem_id="q2a-text",
            )
            big = {"scale": 0, "min_width": 92}
            self.send = gr.Button(self.w["send"], variant="primary", elem_id="q2a-send", **big)
            self.stop = gr.Button(
                self.w["stop"], variant="stop", elem_id="q2a-stop", visible=False, **big
            )
        with gr.Row(elem_classes="q2a-actions"):
            small = {"size": "sm", "interactive": False}
            self.retry = gr.Button(self.w["retry"], elem_id="q2a-retry", **small)
            self.edit = gr.Button(self.w["edit"], elem_id="q2a-edit", **small)
            self.clear = gr.Button(self.w["clear"], elem_id="q2a-clear", **small)

    def _sound(self, gr: Any) -> None:
        with gr.Group():
            self.microphone = gr.Audio(
                sources=["microphone"],
                type="filepath",  # numpy would need ffmpeg
                label=self.w["record"],
                editable=False,
                buttons=[],
                elem_id="q2a-microphone",
            )
            self.trouble = gr.HTML(elem_id="q2a-trouble")
            self.voice = gr.Checkbox(label=self.w["voice"], elem_id="q2a-voice")
        self.upload = gr.File(  # of any name: audio.load looks at what is in it
            file_count="multiple",
            type="filepath",
            label=self.w["upload"],
            height=112,
            elem_id="q2a-upload",
        )

    def _settings(self, gr: Any) -> None:
        w, settings = self.w, self.settings
        with gr.Accordion(w["settings"], open=False, elem_id="q2a-settings") as self.accordion:
            self.system = gr.Textbox(
                label=w["system"],
                info=w["system hint"],
                placeholder=DEFAULT_SYSTEM,
                lines=2,
                max_length=20_000,
                elem_id="q2a-system",
            )
            self.temperature = gr.Slider(
                0,
                2,
                settings.temperature if settings.do_sample else 0,
                step=0.05,
                label=w["temperature"],
                info=w["temperature hint"],
                elem_id="q2a-temperature",
            )
            self.tokens = gr.Slider(
                1,
                max(1024, settings.max_new_tokens),
                settings.max_new_tokens,
                step=1,
                label=w["tokens"],
                elem_id="q2a-tokens",
            )
            self.seed = gr.Textbox(  # gr.Number makes a 0 of nothing
                label=w["seed"],
                info=w["seed hint"],
                placeholder=w["by chance"],
                max_length=19,
                elem_id="q2a-seed",
            )
