//! An agent's prompt for one work.

use handlebars::{Context, Handlebars, Helper, HelperResult, Output, RenderContext, RenderErrorReason};
use serde_json::{Map, Value};

use crate::model::agent::Prompt;

/// The prompt, filled with the work's context if it is a template; what the context leaves out comes from the schema's defaults.
///
/// # Errors
/// What is wrong with the template, and where.
pub(super) fn render(prompt: &Prompt, context: &Map<String, Value>, schema: Option<&Value>) -> Result<String, String> {
    let template = match prompt {
        Prompt::Plain(text) => return Ok(text.clone()),
        Prompt::Template(template) => template,
    };
    let mut handlebars = Handlebars::new();
    handlebars.register_escape_fn(handlebars::no_escape);
    // What a dotprompt host would turn into messages is one text here, so its marks leave nothing behind.
    for mark in ["role", "history", "section"] {
        handlebars.register_helper(mark, Box::new(nothing));
    }
    handlebars.register_helper("media", Box::new(media));
    handlebars.register_helper("json", Box::new(json));
    let mut filled = context.clone();
    for (name, property) in schema.and_then(|schema| schema["properties"].as_object()).into_iter().flatten() {
        if let Some(default) = property.get("default").filter(|_| !filled.contains_key(name)) {
            filled.insert(name.clone(), default.clone());
        }
    }
    handlebars.render_template(template, &filled).map_err(|error| error.to_string())
}

fn nothing(_: &Helper<'_>, _: &Handlebars<'_>, _: &Context, _: &mut RenderContext<'_, '_>, _: &mut dyn Output) -> HelperResult {
    Ok(())
}

fn media(helper: &Helper<'_>, _: &Handlebars<'_>, _: &Context, _: &mut RenderContext<'_, '_>, out: &mut dyn Output) -> HelperResult {
    if let Some(url) = helper.hash_get("url").and_then(|url| url.value().as_str()) {
        out.write(url)?;
    }
    Ok(())
}

fn json(helper: &Helper<'_>, _: &Handlebars<'_>, _: &Context, _: &mut RenderContext<'_, '_>, out: &mut dyn Output) -> HelperResult {
    let value = helper.param(0).ok_or(RenderErrorReason::ParamNotFoundForIndex("json", 0))?;
    out.write(&value.value().to_string())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_template_is_filled_without_escapes_and_only_once() {
        let Value::Object(context) = json!({"q": "<b> \"{{x}}\" & {{q}}", "list": [1, {"a": 2}]}) else { unreachable!() };
        let schema = json!({"properties": {"style": {"default": "plain"}, "q": {"default": "other"}}});
        let render = |text: &str| render(&Prompt::Template(text.into()), &context, Some(&schema));
        assert_eq!(render("{{q}} {{style}}").unwrap(), "<b> \"{{x}}\" & {{q}} plain", "a default fills what is left out, and only that");
        assert_eq!(render("{{role \"system\"}}A {{q}}{{missing}}{{history}}").unwrap(), "A <b> \"{{x}}\" & {{q}}");
        assert_eq!(render("{{#each list}}[{{json this}}]{{/each}}{{media url=\"u:1\"}}").unwrap(), "[1][{\"a\":2}]u:1");
        assert!(render("{{#if q}}").is_err());
        assert!(render("{{> nowhere}}").is_err());
        assert_eq!(super::render(&Prompt::Plain("{{q}}".into()), &context, None).unwrap(), "{{q}}");
    }
}
