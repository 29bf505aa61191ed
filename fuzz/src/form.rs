//! `prompt::multipart`: facts of a form do not depend on how it arrives, and an edit puts the model in.

use vllm_lb::config::types::{Retry, RouteConfig, Timeouts};
use vllm_lb::prompt::multipart::FormScanner;
use vllm_lb::route::dialect::BodyDialect;
use vllm_lb::route::rewrite::BodyRewrite;

use super::cuts;

/// Seeds have this boundary.
const CONTENT_TYPE: &str = "multipart/form-data; boundary=b";

const SERVED: &str = "served name";

pub fn run(data: &[u8]) {
    let whole = scanned(data);
    for way in cuts::ways(data) {
        let mut growing = fresh();
        for piece in way {
            growing.scan(&data[..piece.end]);
        }
        assert_eq!(format!("{:?}", growing.facts(data)), format!("{:?}", whole.facts(data)));
    }
    let route = RouteConfig {
        to: Some(SERVED.to_owned()),
        ..RouteConfig::new(Timeouts::default(), Retry::default())
    };
    if let Some(edited) = BodyRewrite::new(&route, BodyDialect::Other).edit_form(CONTENT_TYPE, data) {
        let after = scanned(&edited);
        let model = after.model_span().map(|span| &edited[span]);
        assert_eq!(model, Some(SERVED.as_bytes()));
    }
}

fn fresh() -> FormScanner {
    FormScanner::new(CONTENT_TYPE).expect("it has a boundary")
}

fn scanned(data: &[u8]) -> FormScanner {
    let mut scanner = fresh();
    scanner.scan(data);
    scanner
}
