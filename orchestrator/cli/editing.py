"""The command for editors: what a sweep file may say."""

from __future__ import annotations

import json

from orchestrator.cli.program import AROUND, Command, app


@app.command(cls=Command, rich_help_panel=AROUND)
def schema() -> None:
    """Print the JSON Schema of sweep files, for editors.

    Editors with a YAML server complete and check a file whose first line is
    `# yaml-language-server: $schema=PATH`, where PATH holds what this prints.
    """
    from orchestrator.sweep import json_schema

    print(json.dumps(json_schema(), indent=1))
