//! The part of a body that streams past: read where a route was found by the model that the part before it
//! names.
//!
//! Engines take the last of two models. A second one would walk around the first one's route, so that a body
//! which has one is refused before it is whole: no engine can have answered it.
//!
//! Never: a byte that is held beyond what the next piece is read with.

use crate::prompt::multipart::FormTail;
use crate::prompt::scan::DocumentTail;
use crate::reject::Reject;

/// See the module.
pub enum BodyTail {
    Json(DocumentTail),
    Multipart(Box<FormTail>),
}

// === impl BodyTail ===

impl BodyTail {
    /// Reads the next piece. Fails where the body is to be refused.
    pub fn read(&mut self, piece: &[u8]) -> Result<(), Reject> {
        match self {
            BodyTail::Json(tail) => tail.read(piece),
            BodyTail::Multipart(tail) => tail.read(piece),
        }
        self.check()
    }

    /// Fails where what was read so far is to be refused.
    pub fn check(&self) -> Result<(), Reject> {
        let (names_model, is_lost) = match self {
            BodyTail::Json(tail) => (tail.names_model(), false),
            BodyTail::Multipart(tail) => (tail.names_model(), tail.is_lost()),
        };
        if names_model {
            return Err(second_model());
        }
        if is_lost { Err(lost_form()) } else { Ok(()) }
    }
}

/// The refusal of a body that names a second model behind the part by which its route was found.
pub fn second_model() -> Reject {
    Reject::Field { param: "model".into(), message: "The body names its model more than once.".into() }
}

/// The refusal of a form that cannot be followed, where something depends on what it says.
pub fn lost_form() -> Reject {
    Reject::Field { param: "body".into(), message: "The parts of the form cannot be followed.".into() }
}
