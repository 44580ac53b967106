"""List, show and check recipes."""

from __future__ import annotations

import click

from vitedge.cli._output import emit_json, json_option, say


@click.group("recipes")
def command() -> None:
    """List, show and check recipes: YAML files that each tell one reproducible story."""


@command.command("list")
@json_option
def list_recipes(as_json: bool) -> None:
    """Names of the recipes that come with vitedge."""
    from vitedge.recipe import load_recipe
    from vitedge.schema import list_files

    rows = [{"name": name, "description": load_recipe(name).description, "path": str(path)} for name, path in list_files("recipes").items()]
    if as_json:
        emit_json({"schema_version": 1, "recipes": rows})
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        click.echo(f"{row['name']:{width}}  {row['description']}")


@command.command("show")
@click.argument("recipe")
@json_option
def show(recipe: str, as_json: bool) -> None:
    """A recipe with every default filled in."""
    import yaml

    from vitedge.recipe import load_recipe

    plain = load_recipe(recipe).to_plain()
    if as_json:
        emit_json({"schema_version": 1, "recipe": plain})
    else:
        click.echo(yaml.safe_dump(plain, sort_keys=False).rstrip())


@command.command("validate")
@click.argument("recipes", nargs=-1, required=True)
@json_option
def validate(recipes: tuple[str, ...], as_json: bool) -> int:
    """Check recipes; every problem of a file is said in one go (exit code 2)."""
    from vitedge.errors import FileProblems, UsageError
    from vitedge.recipe import load_recipe

    results = []
    for name in recipes:
        try:
            load_recipe(name)
            results.append({"recipe": name, "valid": True, "problems": []})
            say(f"{name}: valid")
        except UsageError as error:
            problems = error.problems if isinstance(error, FileProblems) else [error]
            results.append({"recipe": name, "valid": False, "problems": [str(problem) for problem in problems]})
            for problem in problems:
                say(f"error: {problem}")
    if as_json:
        emit_json({"schema_version": 1, "results": results})
    return 0 if all(result["valid"] for result in results) else UsageError.exit_code


@command.command("schema")
def schema() -> None:
    """JSON schema of a recipe file, for editors."""
    import json

    from vitedge.recipe import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))
