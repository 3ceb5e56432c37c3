"""The tables about speed, and about our executor against the public one."""

from table_form import Result, measured_on, of, table


@of("reasoning_speed")
def reasoning_speed(found: Result) -> str:
    rows = []
    for batch, answer in found["answering"].items():
        ms, rate = answer["ms_per_answer"], answer["answers_per_second"]
        for kind in ("padded", "packed"):
            rows.append(
                [
                    f"answer, batch {batch}, {kind}",
                    f"{ms[f'generator_{kind}']:.1f}",
                    f"{ms['network']:.1f}",
                    f"{rate[kind]:.2f}",
                ]
            )
    training = found["training"]
    for kind, rate in training["questions_per_second"].items():
        rows.append([f"train, batch {training['batch']}, {kind}", "–", "–", f"{rate:.2f}"])
    head = [
        "the paper's configuration",
        "generator, ms a question",
        "network, ms a question",
        "questions a second",
    ]
    note = (
        f"Mean length of the questions {found['mean_length']:.1f} tokens, padded to {found['places']}; "
        f"parameters {found['parameters']['generator']:,} and {found['parameters']['network']:,}. "
    )
    return table(head, rows) + "\n" + note + measured_on(found)


@of("laptop_speed")
def laptop_speed(found: Result) -> str:
    rows = []
    for batch, answer in found["answering"].items():
        ms = answer["ms_per_answer"]
        rows.append(
            [
                f"answer, batch {batch}",
                *(f"{ms[part]:.2f}" for part in ("perception", "generator", "whole")),
                f"{answer['answers_per_second']:,.0f}",
            ]
        )
    training, names = found["training"], {"float32_eager": "float32, eager"}
    compiled = ", compiled" if found["training"]["compile"] else ""
    names["as_recipe"] = f"{training['precision']}{compiled}"
    for kind, rate in training["questions_per_second"].items():
        rows.append([f"train, batch {training['batch']}, {names[kind]}", *["–"] * 3, f"{rate:,.0f}"])
    head = ["the laptop configuration", "perception, ms", "generator, ms", "whole, ms", "questions a second"]
    note = f"Parameters: {', '.join(f'{part} {number:,}' for part, number in found['parameters'].items())}. "
    return table(head, rows) + "\n" + note + measured_on(found)


@of("generation_speed")
def generation_speed(found: Result) -> str:
    rows = [
        [
            size,
            one["objects"],
            f"{one['scene_ms']:.1f}",
            f"{one['render_ms']:.1f}",
            f"{one['images_per_second']:,.0f}",
        ]
        for size, one in found["by_size"].items()
    ]
    asked = "; ".join(
        f"{rate['median']:,.0f} a second, {rate['slowest']:,.0f} to {rate['fastest']:,.0f} ({recipe} scenes)"
        for recipe, rate in found["questions_per_second"].items()
    )
    head = ["image", "objects", "scene, ms", "rendering, ms", "images a second"]
    return table(head, rows) + f"\nQuestions: {asked}. " + measured_on(found)


@of("seeing_speed")
def seeing_speed(found: Result) -> str:
    rows = [
        [batch, *(f"{rates[layout]:,.0f}" for layout in ("channels_first", "channels_last"))]
        for batch, rates in found["images_per_second_by_batch"].items()
    ]
    return (
        table(["batch", "channels first, images a second", "channels last"], rows) + "\n" + measured_on(found)
    )


@of("gru_speed")
def gru_speed(found: Result) -> str:
    rows = [
        [task, *(f"{found[task][key]:.1f}" for key in ("nn_gru_ms", "ours_ms", "ratio"))]
        for task in ("training", "answering")
    ]
    note = f"Batch {found['batch']}, width {found['width']}, words of {found['word_dim']}. "
    return table(["packed GRU", "nn.GRU, ms", "ours, ms", "ratio"], rows) + "\n" + note + measured_on(found)


@of("clevr_executor_agreement")
def executor_agreement(found: Result) -> str:
    names = {
        "our_executor_on_the_public_generators_questions": "our executor on the public generator's questions",
        "the_public_engine_on_our_questions": "the public engine on our questions",
    }
    rows = [
        [text, *(f"{found[key][what]:,}" for what in ("scenes", "questions", "families", "disagreements"))]
        for key, text in names.items()
    ]
    return table(["who answers what", "scenes", "questions", "families", "disagreements"], rows)
