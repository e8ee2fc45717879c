"""An evaluation for people: one page without scripts, whose pictures lie beside it, and the same table as text."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

__all__ = ["chart", "page", "table"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top; }
th { border-bottom: 1px solid #999; } .dim { color: #666; } svg text { font: 12px system-ui, sans-serif; }
.row { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; margin-bottom: 1.5rem; }
figure { margin: 0; } img { width: 100%; } figcaption { color: #666; font-size: 13px; }
"""
_SETS = {"teacher": "teacher's", "student": "student's", "real": "real"}


def rows(report: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, value and direction or reason of every score, in the order of the table."""
    scores, absent, seconds = report["scores"], report["absent"], report["seconds"]
    single = [
        ("psnr", "PSNR", "{:.2f} dB", "higher is nearer"),
        ("ssim", "SSIM", "{:.4f}", "1 is the teacher"),
        ("lpips", "LPIPS", "{:.4f}", "0 is the teacher"),
        ("latent_cosine", "cosine of the latents", "{:.4f}", "1 is the teacher"),
        ("attention_error", "error of the attentions, mean", "{:.3g}", "squared, relative to the teacher's output"),
        ("prediction_error", "error of the prediction", "{:.3g}", "squared, relative to the teacher's"),
    ]
    for key, title, form, meaning in single:
        value = scores[key]
        yield title, "–" if value is None else form.format(value), meaning if value is not None else absent[key]
    for key, title, form in (
        ("clip_score", "CLIP score", "{:.2f}"),
        ("cmmd", "CMMD", "{:.3g}"),
        ("fid_clip", "FID, CLIP features", "{:.3g}"),
        ("fid_inception", "FID, Inception features", "{:.3g}"),
    ):
        if scores[key] is None:
            yield title, "–", absent[key]
            continue
        for name, value in scores[key].items():
            between = " to ".join(_SETS[part] for part in name.split("_"))
            yield f"{title}, {between}", form.format(value), "higher is better" if key == "clip_score" else "0 is equal"
    yield "teacher, seconds per picture", f"{seconds['teacher_median']:.3f}", "median over batches, without the VAE"
    yield "student, seconds per picture", f"{seconds['student_median']:.3f}", f"{seconds['ratio']:.2f}x the speed"


def table(report: dict[str, Any]) -> str:
    """The scores for a terminal."""
    lines = list(rows(report))
    wide, middle = (max(len(line[i]) for line in lines) for i in (0, 1))
    text = [f"{title:<{wide}}  {value:>{middle}}  {meaning}" for title, value, meaning in lines]
    return "\n".join([summary(report), "", *text, *("note: " + note for note in report["notes"])])


def summary(report: dict[str, Any]) -> str:
    """What was drawn, with what, and where, in one line."""
    settings = report["settings"]
    return (
        f"{len(report['pictures'])} pictures each of teacher and student, {settings['size']}x{settings['size']} "
        f"pixels, {settings['steps']} steps, guidance {settings['guidance']:g}; layers {settings['layers']}; "
        f"{settings['dtype']} on {report['machine']['device']}{_without_weights(report['weights'])}"
    )


def _without_weights(student: dict[str, Any]) -> str:
    if student["sha256"]:
        return ""
    return f"; the student is {student['preset']} attention, quality {student['config']['quality']}, without weights"


def chart(errors: dict[str, float]) -> str:
    """Every attention's error as a bar, in an SVG for a page; `errors` by `<block>.<site>`."""
    line, left, right = 18, 90, 620
    longest = max(errors.values()) or 1.0
    parts = []
    for i, (key, value) in enumerate(sorted(errors.items(), key=lambda item: (int(item[0].split(".")[0]), item[0]))):
        width, y = (right - left) * value / longest, i * line
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(key)}</text>')
        parts.append(f'<rect x="{left}" y="{y + 2}" width="{width:.1f}" height="{line - 4}" fill="#4477aa"/>')
        parts.append(f'<text x="{left + width + 6:.1f}" y="{y + 13}">{value:.3g}</text>')
    size = f'width="{right + 80}" height="{len(errors) * line}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>{"".join(parts)}</svg>'


def page(report: dict[str, Any]) -> str:
    """The whole evaluation as HTML; its links are relative."""
    scores, model, weights = report["scores"], report["model"], report["weights"]
    body = [
        "<h1>Student and teacher</h1>",
        f"<p>{escape(summary(report))}.</p>",
        "<table><tr><th>score</th><th>value</th><th></th></tr>",
        *(
            f'<tr><td>{escape(title)}</td><td>{escape(value)}</td><td class="dim">{escape(meaning)}</td></tr>'
            for title, value, meaning in rows(report)
        ),
        "</table>",
        *(f'<p class="dim">{escape(note)}.</p>' for note in report["notes"]),
        f'<p class="dim">{escape(model["class"])}; weights {escape((weights["sha256"] or "none")[:16])}; '
        f"everything else that a rerun needs is in eval.json.</p>",
    ]
    if scores["attentions"]:
        body += [
            "<h2>Error of each attention, on the teacher's own inputs</h2>",
            chart(scores["attentions"]),
            '<p class="dim">Mean squared error relative to the mean square of the teacher\'s output, by block and '
            "site.</p>",
        ]
    body.append("<h2>Pictures</h2>")
    for picture in report["pictures"]:
        ratio = "no difference" if picture["psnr"] is None else f"PSNR {picture['psnr']:.2f} dB"
        words = f"seed {picture['seed']}, {ratio}, SSIM {picture['ssim']:.4f}"
        body.append(f'<h3>{escape(picture["prompt"])}</h3><p class="dim">{words}</p><div class="row">')
        captions = {"teacher": "teacher", "student": "student", "difference": "difference, 4 times"}
        for name, caption in captions.items():
            file = escape(picture["files"][name])
            image = f'<a href="{file}"><img src="{file}" alt="{caption}" loading="lazy"></a>'
            body.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        body.append("</div>")
    head = f'<meta charset="utf-8"><title>Student and teacher</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>' + "\n".join(body) + "</body></html>\n"
