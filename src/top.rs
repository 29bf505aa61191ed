//! `vllm-lb top`: the overview of a balancer in a terminal. What is shown and what keys do, without the
//! terminal, the connection and the clock, which `app::top` has.
//!
//! ```text
//! document    the overview, as far as it is shown
//! history     the latest numbers of each upstream, from which rates and sparklines are made
//! state       what is shown: selection, order, filter, questions; keys change it
//! view        draws the state
//! numbers     writes numbers in a few columns
//! ```

pub(crate) mod document;
mod history;
mod numbers;
pub(crate) mod state;
pub(crate) mod view;
