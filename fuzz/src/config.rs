//! Configuration files: any text gives a configuration or problems, the same each time.

use vllm_lb::config::check::{check, warnings};
use vllm_lb::config::diff::{as_it_runs, diff};
use vllm_lb::config::render;

pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let environment = |name: &str| (name != "ABSENT").then(|| "8000".to_owned());
    match (check(text, &environment), check(text, &environment)) {
        (Ok(config), Ok(again)) => {
            assert_eq!(render::json(&config), render::json(&again));
            assert_eq!(format!("{:?}", diff(&config, &again)), format!("{:?}", diff(&config, &config)));
            warnings(&config);
            as_it_runs(&config, again);
        }
        (Err(problems), Err(again)) => {
            assert!(!problems.is_empty(), "it was refused without a reason");
            let lines = |problems: &[_]| format!("{problems:?}");
            assert_eq!(lines(&problems), lines(&again));
        }
        _ => panic!("it was taken once and refused once"),
    }
}
