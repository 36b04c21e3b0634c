"""How the page looks: a Gradio theme without fonts from the network, and the style sheet of its own pieces."""

from __future__ import annotations

from typing import Any

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; padding: 20px 16px 40px !important; }
.gradio-container .main, .gradio-container .wrap.sidebar-parent { padding: 0 !important; }
footer { display: none !important; }
.era-head h1 { font-size: 26px; letter-spacing: -.02em; margin: 0; }
.era-head p { margin: 2px 0 0; color: var(--body-text-color-subdued); font-size: 15px; }
.era-card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary) !important;
  border-radius: 16px !important; padding: 18px !important; box-shadow: 0 1px 3px rgb(15 23 42 / 6%); }
.era-card { gap: 14px !important; align-self: start; }
.era-card .form { gap: 14px !important; border: 0 !important; background: transparent !important; }
.era-card .block:has(> .html-container:empty), .era-card .block:has(> .html-container > .prose:empty) {
  display: none !important; }
.era-step h2 { font-size: 17px; margin: 0; display: flex; align-items: center; gap: 9px; }
.era-step h2 b { flex: none; width: 25px; height: 25px; border-radius: 50%; background: var(--primary-600);
  color: #fff; font-size: 14px; display: grid; place-items: center; }
.era-step p { margin: 4px 0 0; color: var(--body-text-color-subdued); font-size: 14px; }
.era-picker { padding: 0 !important; border: 0 !important; background: transparent !important; }
.era-picker .grid-wrap { max-height: none !important; min-height: 0 !important; overflow: visible !important;
  padding: 2px !important; height: auto !important; }
.era-picker .grid-container { grid-template-columns: repeat(6, minmax(0, 1fr)) !important; gap: 8px !important;
  height: auto !important; grid-auto-rows: auto !important; }
.era-picker .thumbnail-lg { border-radius: 12px !important; overflow: hidden; aspect-ratio: 1; }
.era-picker .caption-label { left: 0 !important; right: 0 !important; bottom: 0 !important; max-width: none !important;
  width: 100%; padding: 1px 2px !important; border: 0 !important; border-radius: 0 !important; font-size: 11px;
  line-height: 1.5; text-align: center; background: rgb(255 255 255 / 85%) !important; color: #1e293b !important; }
.era-erase { font-size: 17px !important; min-height: 50px; border-radius: 12px !important; }
.era-facts, .era-tiles { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 8px;
  margin: 0; }
.era-facts > div, .era-tiles > div { background: var(--background-fill-secondary); border-radius: 10px;
  padding: 8px 10px; min-width: 0; }
.era-facts dt, .era-tiles dt { font-size: 12px; color: var(--body-text-color-subdued); }
.era-facts dd { margin: 0; font-size: 14px; font-weight: 600; overflow-wrap: anywhere; }
.era-tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.era-tiles dd { margin: 0; font-size: 26px; font-weight: 700; }
.era-tiles small { color: var(--body-text-color-subdued); }
.era-note { font-size: 14px; padding: 8px 12px; border-radius: 10px; background: var(--background-fill-secondary);
  overflow-wrap: anywhere; margin-top: 6px; }
.era-fault { background: #fef2f2; color: #991b1b; border: 1px solid #fecaca; }
.dark .era-fault { background: #450a0a; color: #fecaca; border-color: #7f1d1d; }
.era-progress { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 12px; font-size: 14px; }
.era-bar { flex: 1 0 100%; height: 8px; border-radius: 4px; background: var(--border-color-primary);
  overflow: hidden; }
.era-bar i { display: block; height: 100%; border-radius: 4px; background: var(--primary-600);
  transition: width .3s; }
.era-unknown i { width: 30%; animation: era-slide 1.4s infinite ease-in-out alternate; }
@keyframes era-slide { from { margin-left: 0; } to { margin-left: 70%; } }
.era-pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 14px; }
.era-pair figure, .era-live figure, .era-preview { margin: 0; min-width: 0; }
.era-pair figcaption { font-weight: 600; font-size: 14px; margin-bottom: 6px; }
.era-grid { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 6px; }
.era-grid img, .era-live img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 10px; display: block;
  background: var(--background-fill-secondary); }
.era-empty { display: grid; place-items: center; text-align: center; aspect-ratio: 1; margin: 0; padding: 12px;
  border: 2px dashed var(--border-color-primary); border-radius: 12px; color: var(--body-text-color-subdued);
  font-size: 14px; }
.era-readings h4 { margin: 0 0 6px; font-size: 14px; overflow-wrap: anywhere; }
.era-reading { display: grid; grid-template-columns: 1fr auto; gap: 0 12px; font-size: 13px; padding: 6px 0;
  border-top: 1px solid var(--border-color-primary); }
.era-reading b { font-size: 14px; overflow-wrap: anywhere; }
.era-reading span { color: var(--body-text-color-subdued); }
.era-meter { height: 6px; border-radius: 3px; background: var(--border-color-primary); align-self: center;
  overflow: hidden; }
.era-meter i { display: block; height: 100%; background: var(--primary-600); }
.era-live { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 8px; }
.era-live figcaption, .era-preview figcaption { font-size: 12px; color: var(--body-text-color-subdued);
  overflow-wrap: anywhere; }
.era-marked img { outline: 3px solid #dc2626; outline-offset: -3px; }
.era-preview img { max-width: 100%; border-radius: 10px; image-rendering: auto; }
.era-report { width: 100%; height: 620px; border: 1px solid var(--border-color-primary); border-radius: 12px;
  background: #fff; }
.era-save { font-size: 14px; margin: 8px 0; }
.era-slot { align-items: end; flex-wrap: nowrap !important; }
.era-slot > :first-child { flex: 1 1 auto !important; min-width: 0 !important; }
.era-slot > button { flex: 0 0 auto !important; min-width: 84px !important; }
.era-chips { flex-wrap: wrap !important; gap: 6px !important; }
.era-chips button { flex: 0 1 auto !important; min-width: 0 !important; border-radius: 999px !important; }
.era-ask { align-items: end; flex-wrap: nowrap !important; }
.era-ask > button { flex: 0 0 84px !important; min-width: 84px !important; }
@media (max-width: 640px) {
  .gradio-container { padding: 12px 10px 32px !important; }
  .era-card { padding: 14px !important; }
  .era-report { height: 560px; width: calc(100% + 28px); margin: 0 -14px; border-radius: 0; border-width: 1px 0; }
  .era-facts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .era-picker .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
}
"""


def theme() -> Any:
    """Return the theme of the page; its fonts are those of the reader's system."""
    import gradio

    return gradio.themes.Base(
        primary_hue="teal",
        secondary_hue="slate",
        neutral_hue="slate",
        radius_size="lg",
        font=list(FONT),
        font_mono=list(MONO),
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_border_width="0px",
        block_padding="0px",
        body_text_color_subdued="*neutral_600",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        block_title_text_weight="600",
        block_info_text_color="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color_dark="*neutral_200",
        block_info_text_color_dark="*neutral_300",
        block_background_fill_dark="*neutral_900",
        input_background_fill_dark="*neutral_800",
        block_shadow="none",
        block_label_text_weight="600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white",
        slider_color="*primary_600",
        input_background_fill="*neutral_50",
        input_border_width="1px",
    )
