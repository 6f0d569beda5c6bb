"""Chat templates as they are on the hub: rendered as the field does, or refused by one sentence."""

import json

import pytest

from examples.llama import chat

pytest.importorskip("jinja2")

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{% generation %}{{ '<|im_start|>assistant\\n' }}{% endgeneration %}
{% endif %}
"""
LLAMA = """\
{% for message in messages %}
    {% if message.role == 'system' %}
        {{ raise_exception('no system message') }}
    {% endif %}
    {% if loop.index > 1 %}{% break %}{% endif %}
{{ bos_token }}[INST] {{ message.content }} [/INST]{% endfor %}"""


def write(directory, template, **config):
    where = chat.CONFIG if isinstance(template, list) else chat.FILE
    if where == chat.FILE:
        (directory / chat.FILE).write_text(template)
    else:
        config["chat_template"] = template
    (directory / chat.CONFIG).write_text(json.dumps(config))
    return chat.ChatTemplate(directory)


def test_messages_are_rendered(tmp_path):
    template = write(tmp_path, CHATML)
    user = "<|im_start|>user\nHi\n<b> grüß'<|im_end|>\n"
    asked, other = template.render([" Hi\n<b> grüß' ", "Bye"])
    assert asked == user + "<|im_start|>assistant\n" and "user\nBye<|im_end|>" in other
    told = "<|im_start|>system\nBe short.<|im_end|>\n"
    assert template.render(["Hi\n<b> grüß'"], "Be short.")[0].startswith(told + user)


def test_special_tokens_are_those_of_the_tokenizer(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": LLAMA}]
    template = write(tmp_path, named, bos_token={"content": "<s>", "lstrip": False})
    assert template.render(["Hi"]) == ["<s>[INST] Hi [/INST]"]
    with pytest.raises(ValueError, match=r"config.json: the chat template fails: no system mess"):
        template.render(["Hi"], "Be short.")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% if %}", "chat_template.jinja: the chat template is not Jinja"),
        ("{{ messages[0].content.__class__.__mro__ }}", "template fails: access to attribute"),
        ("{{ messages.append(1) }}", "the chat template fails"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "the chat template fails: Range too big"),
        ("{{ 'x' * 10 ** 10 }}", "the chat template fails: it takes too much memory"),
        ("{% include '/etc/passwd' %}", "the chat template fails: no loader"),
        ("{{ nothing.at.all }}", "the chat template fails: 'nothing' is undefined"),
        ([{"name": 3, "template": "x"}], "config.json: chat_template: name must be text, got 3"),
    ],
)
def test_templates_that_fail_or_reach_further_are_refused(template, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, template).render(["Hi"])


def test_templates_that_do_not_end_are_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 1)
    with pytest.raises(ValueError, match="chat_template.jinja: the chat template does not end"):
        write(tmp_path, "{{ 9 ** (9 ** 9) }}").render(["Hi"])


def test_a_model_without_a_template_is_told_from_one_with_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no chat template, neither .* leave --chat"):
        chat.ChatTemplate(tmp_path)
    (tmp_path / chat.CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json: it must be an object"):
        chat.ChatTemplate(tmp_path)
    (tmp_path / chat.CONFIG).write_text('{"chat_template": 3}')
    with pytest.raises(ValueError, match="chat_template must be text, or a list"):
        chat.ChatTemplate(tmp_path)
    (tmp_path / chat.CONFIG).unlink()
    (tmp_path / chat.FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="chat_template.jinja is not text in UTF-8"):
        chat.ChatTemplate(tmp_path)
