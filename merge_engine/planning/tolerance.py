"""Settings that mergekit ignores, and that published recipes have: they are left out, with a warning each."""

from __future__ import annotations

from merge_engine.methods import Method, parameter_names
from merge_engine.recipe import Recipe
from merge_engine.recipe.problems import suggestion
from merge_engine.text import some


def without_ignored_settings(recipe: Recipe, method: Method, lenient: bool) -> tuple[Recipe, list[str]]:
    """The recipe with only those settings that its method has, and a warning for each name that is left out.

    Ignored are parameters of other methods, and those for all models in the settings of one model. A name that no
    method has stays, for an error with the nearest right name; ``lenient`` ignores it too.
    """
    stacks = recipe.stacks
    of_sources = {source.settings.place for each in stacks.slices for source in each.sources}
    declared = {parameter.name: parameter for parameter in method.parameters}
    known = parameter_names() if stacks.scopes else frozenset()
    places: dict[tuple[str, str], list[str]] = {}
    for scope in stacks.scopes:
        for name in scope.settings:
            if name == "int8_mask":
                continue
            if name in declared:
                if declared[name].scope == "tensor" and scope.place in of_sources:
                    why = "it holds for all models at once; move it to the top-level parameters to use it"
                    places.setdefault((name, why), []).append(scope.place)
            elif name in known:
                places.setdefault((name, f"{method.name} has no such parameter"), []).append(scope.place)
            elif lenient:
                why = f"no method has such a parameter{suggestion(name, declared)}"
                places.setdefault((name, why), []).append(scope.place)
    if not places:
        return recipe, []
    left_out: dict[str, set[str]] = {}
    for (name, _), having in places.items():
        for place in having:
            left_out.setdefault(place, set()).add(name)
    warnings = [
        f"{some([f'{place}.{name}' for place in having])}: ignored, as mergekit does; {why}"
        for (name, why), having in places.items()
    ]
    return recipe.without(left_out), warnings
