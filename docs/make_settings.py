"""Writes docs/settings.md from the schema: `python docs/make_settings.py`. A test holds the page to it."""

from pathlib import Path

from mmtard.config.explain import Setting, all_settings

HEADER = """# Settings

After this page you know every setting, its default and its meaning. `mmtard config --explain KEY` says the same in the
terminal, and `mmtard config --schema` gives a JSON schema to editors. `mmtard config CONFIG` prints the resolved
settings of a configuration and what is wrong with them. Any setting can be given as `key.sub=value` on the command
line.

This page is written by `python docs/make_settings.py`.
"""


def page(settings: list[Setting]) -> str:
    """The page as Markdown: a table a section, in the order of the configuration file."""
    sections: dict[str, list[Setting]] = {}
    for setting in settings:
        section = setting.key.partition(".")[0] if "." in setting.key else "run"
        if setting.method and setting.key != "method.name":
            section = f"method, name: {setting.method}"
        sections.setdefault(section, []).append(setting)
    parts = [HEADER]
    for name, rows in sections.items():
        parts.append(f"\n## {name}\n\n| key | values | default | meaning |\n|---|---|---|---|\n")
        parts += [_row(setting) for setting in rows]
    return "".join(parts)


def _row(setting: Setting) -> str:
    default = "must be given" if setting.default is None else f"`{setting.default}`"
    # The page of methods says what each of them is; here they would make one row of a thousand columns.
    meaning = "the training objective: [Methods](methods.md)" if setting.key == "method.name" else setting.meaning
    cells = (f"`{setting.key}`", setting.values, default, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(page(all_settings()), encoding="utf-8")
