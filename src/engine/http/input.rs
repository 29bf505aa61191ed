//! Parses a JSON body as FastAPI and pydantic do: the same values pass, with the same errors.
//!
//! Only the fields that the simulation uses are checked. Parsing never panics.

use http::HeaderMap;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::python::{json_error, repr};

/// The longest value in an error message, in characters.
const MAX_SHOWN_CHARS: usize = 200;

/// The fields of a request, and the problems found so far.
#[derive(Debug)]
pub(super) struct Input {
    pub body: Value,
    problems: Vec<String>,
    /// The path of the first problem.
    param: Option<String>,
}

// === impl Input ===

impl Input {
    /// Parses a body that must be a JSON object.
    pub(super) fn parse(headers: &HeaderMap, bytes: &[u8]) -> Result<Self, ApiError> {
        let kind = headers.get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        if kind != "application/json" {
            let problem = "Unsupported Media Type: Only 'application/json' is allowed".to_owned();
            return Err(ApiError::schema(&[problem], None));
        }
        let mut input = Self { body: Value::Null, problems: Vec::new(), param: None };
        if bytes.is_empty() {
            input.problem("missing", "body", "Field required", &Value::Null);
            return input.checked();
        }
        let unreadable = || ApiError {
            framework: true,
            kind: "Bad Request",
            ..ApiError::bad_request("There was an error parsing the body")
        };
        let text = std::str::from_utf8(bytes).map_err(|_| unreadable())?;
        match serde_json::from_str(text) {
            Ok(body) => input.body = body,
            Err(_) => {
                let (at, reason) = json_error(text).ok_or_else(unreadable)?;
                let problem = format!(
                    "{{'type': 'json_invalid', 'loc': 'body.{at}', 'msg': 'JSON decode error', \
                     'input': '<dict of 0 items>', 'ctx': {{'error': {}}}}}",
                    repr(reason)
                );
                return Err(ApiError::schema(&[problem], Some(&format!("body.{at}"))));
            }
        }
        if !input.body.is_object() {
            let what = "Input should be a valid dictionary or object to extract fields from";
            let body = input.body.take();
            input.problem("model_attributes_type", "body", what, &body);
            return input.checked();
        }
        Ok(input)
    }

    /// Returns the input, or the error with all problems.
    pub(super) fn checked(self) -> Result<Self, ApiError> {
        if self.problems.is_empty() {
            return Ok(self);
        }
        Err(ApiError::schema(&self.problems, self.param.as_deref()))
    }

    /// Returns the field's value; `None` when it is absent or null.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.body.get(key).filter(|value| !value.is_null())
    }

    /// Reports a missing field.
    pub(super) fn require(&mut self, key: &str) {
        if self.body.get(key).is_none() {
            let body = self.body.take();
            self.problem("missing", &format!("body.{key}"), "Field required", &body);
            self.body = body;
        }
    }

    /// Reads a field that must be a string.
    pub(super) fn string(&mut self, key: &str) -> Option<String> {
        let value = self.get(key)?.clone();
        match value {
            Value::String(text) => Some(text),
            other => {
                self.wrong(key, "string_type", "Input should be a valid string", &other);
                None
            }
        }
    }

    /// Returns an integer; as in pydantic, `3.0` and `"3"` are integers too.
    pub(super) fn integer(&mut self, key: &str) -> Option<i64> {
        let value = self.get(key)?.clone();
        let (kind, message) = match &value {
            Value::Number(number) => match (number.as_i64(), number.as_f64()) {
                (Some(integer), _) => return Some(integer),
                (None, Some(float)) if float.fract() == 0.0 => return Some(float as i64),
                _ => {
                    ("int_from_float", "Input should be a valid integer, got a number with a fractional part")
                }
            },
            Value::String(text) => match text.trim().parse() {
                Ok(integer) => return Some(integer),
                Err(_) => {
                    ("int_parsing", "Input should be a valid integer, unable to parse string as an integer")
                }
            },
            _ => ("int_type", "Input should be a valid integer"),
        };
        self.wrong(key, kind, message, &value);
        None
    }

    /// Reads a field that must be a number.
    pub(super) fn float(&mut self, key: &str) -> Option<f64> {
        let value = self.get(key)?.clone();
        let (kind, message) = match &value {
            Value::Number(number) => return number.as_f64(),
            Value::String(text) => match text.trim().parse() {
                Ok(float) => return Some(float),
                Err(_) => {
                    ("float_parsing", "Input should be a valid number, unable to parse string as a number")
                }
            },
            _ => ("float_type", "Input should be a valid number"),
        };
        self.wrong(key, kind, message, &value);
        None
    }

    /// Returns a boolean; as in pydantic, some words and 0 and 1 are booleans too.
    pub(super) fn boolean(&mut self, key: &str) -> Option<bool> {
        let value = self.get(key)?.clone();
        match &value {
            Value::Bool(truth) => return Some(*truth),
            Value::Number(number) if number.as_i64() == Some(0) => return Some(false),
            Value::Number(number) if number.as_i64() == Some(1) => return Some(true),
            Value::String(text) => match text.to_ascii_lowercase().as_str() {
                "true" | "1" | "yes" | "on" | "t" | "y" => return Some(true),
                "false" | "0" | "no" | "off" | "f" | "n" => return Some(false),
                _ => {}
            },
            _ => {}
        }
        let message = "Input should be a valid boolean, unable to interpret input";
        self.wrong(key, "bool_parsing", message, &value);
        None
    }

    /// Records a problem unless the field is absent or a list.
    pub(super) fn list(&mut self, key: &str) {
        if let Some(value) = self.get(key).filter(|value| !value.is_array()).cloned() {
            self.wrong(key, "list_type", "Input should be a valid list", &value);
        }
    }

    /// Reads a field that must be an object.
    pub(super) fn object(&mut self, key: &str) -> Option<Map<String, Value>> {
        let value = self.get(key)?.clone();
        match value {
            Value::Object(map) => Some(map),
            other => {
                self.wrong(key, "dict_type", "Input should be a valid dictionary", &other);
                None
            }
        }
    }

    /// Records a violated rule over several fields, which pydantic reports as a value error of the body.
    pub(super) fn broken_rule(&mut self, message: &str, param: &str) {
        let input = summary(&self.body);
        let text = repr(&format!("Value error, {message} (parameter={param})"));
        let error = repr(&format!("{message} (parameter={param})"));
        self.problems.push(format!(
            "{{'type': 'value_error', 'loc': 'body', 'msg': {text}, 'input': {}, \
             'ctx': {{'error': VLLMValidationError({error})}}}}",
            repr(&input)
        ));
        self.param.get_or_insert_with(|| param.to_owned());
    }

    fn wrong(&mut self, key: &str, kind: &str, message: &str, value: &Value) {
        self.problem(kind, &format!("body.{key}"), message, value);
    }

    fn problem(&mut self, kind: &str, at: &str, message: &str, value: &Value) {
        let [kind, loc, message, input] = [kind, at, message, &summary(value)].map(repr);
        self.problems.push(format!("{{'type': {kind}, 'loc': {loc}, 'msg': {message}, 'input': {input}}}"));
        self.param.get_or_insert_with(|| at.to_owned());
    }
}

/// Formats a value as vLLM does in an error: containers by their size, the rest as text of bounded length.
fn summary(value: &Value) -> String {
    let text = match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
        Value::Array(items) => return format!("<list of {} items>", items.len()),
        Value::Object(map) => return format!("<dict of {} items>", map.len()),
    };
    match text.char_indices().nth(MAX_SHOWN_CHARS) {
        Some((end, _)) => format!("{}...[truncated]", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn parse(body: &str) -> Result<Input, ApiError> {
        let mut headers = HeaderMap::new();
        headers.insert("content-type", HeaderValue::from_static("application/json; charset=utf-8"));
        Input::parse(&headers, body.as_bytes())
    }

    #[test]
    fn converts_types_as_pydantic_does() {
        let mut input = parse(r#"{"a":"5","b":5.0,"c":"yes","d":"1.5","e":null}"#).unwrap();
        assert_eq!((input.integer("a"), input.integer("b")), (Some(5), Some(5)));
        assert_eq!((input.boolean("c"), input.float("d")), (Some(true), Some(1.5)));
        assert_eq!((input.string("e"), input.integer("missing")), (None, None));
        assert!(input.checked().is_ok());
    }

    #[test]
    fn reports_all_problems() {
        let mut input = parse(r#"{"max_tokens":"many","stop":3,"stream":[1]}"#).unwrap();
        input.require("messages");
        input.integer("max_tokens");
        input.boolean("stream");
        let error = input.checked().unwrap_err();
        assert_eq!(
            error.message,
            "3 validation errors:\n  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required', \
             'input': '<dict of 3 items>'}\n  {'type': 'int_parsing', 'loc': 'body.max_tokens', 'msg': \
             'Input should be a valid integer, unable to parse string as an integer', 'input': 'many'}\n  \
             {'type': 'bool_parsing', 'loc': 'body.stream', 'msg': 'Input should be a valid boolean, \
             unable to interpret input', 'input': '<list of 1 items>'}"
        );
        assert_eq!((error.kind, error.param.as_deref()), ("Bad Request", Some("body.messages")));
    }

    #[test]
    fn the_last_of_two_equal_keys_wins() {
        assert_eq!(parse(r#"{"model":"a","model":"b"}"#).unwrap().string("model").as_deref(), Some("b"));
    }

    #[test]
    fn rejects_a_body_that_is_not_an_object() {
        for body in ["[1]", "3", "", "{\"a\":NaN}"] {
            assert_eq!(parse(body).unwrap_err().status, 400, "{body}");
        }
        assert!(
            Input::parse(&HeaderMap::new(), b"{}").unwrap_err().message.contains("Unsupported Media Type")
        );
    }
}
