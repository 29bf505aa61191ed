//! vllm-lb: several vLLM servers behind one API.
//!
//! # The way of one request
//!
//! ```text
//! bytes --prompt::{scan,canon}--> Facts, chain --route::{paths,table}--> Policy, Plan | Reject
//!   route::{translate,rewrite} (bytes -> bytes, where a route says so)
//!   fleet.snapshot().candidates(model, now), state.weigh(chain), state.stray(session) -> [Candidate]
//!   pick::pick(candidates, knobs, seed) -> Choice -> fleet lease (in the request's Ctx), state.learn(chain)
//!   pingora forwards -> reply::{judge,usage} -> first event: the prefill is over -> route::answer
//!   the lease drops with its outcome -> state.{counted,compared}, observe::request_done
//! ```
//!
//! # Layers: a module imports only downwards (held by `tests/tidy.rs`)
//!
//! ```text
//! L4   main  cli  app                                   assembly: the only code that knows everything
//! L3   proxy | admin | sim::http                        edges; never each other; pingora only in proxy
//! L2b  fleet  state                                     things with tasks, sockets, locks
//! L2a  observe  logging                                 one door for logs and metrics
//! L1   prompt route pick reply sse aggregate config     pure: time and chance come in as arguments
//! L1   breaker local exchange sessions cache dice engine replay sim
//! L0   config::{types,secret}  reject  names  rate      vocabulary
//! ```
//!
//! # Words
//!
//! `upstream` one vLLM server, `model` the name a client sends, `route` a rule of which requests are for
//! whom and what is changed of them, `plan` what it comes to, `block` a hashed piece of a prompt and `chain`
//! all of them, `hit` leading blocks that an upstream is believed to hold, `candidate` a ready upstream as
//! numbers, `choice` what `pick` returns, `lease` one request in flight on one upstream (a guard), `outcome`
//! how it ended, `snapshot` immutable view of the fleet, `reject` any refusal of our own, `knob` a tunable of
//! `pick`, `balancer` one running vllm-lb, `sibling` another one on the same Redis.

pub mod admin;
pub mod aggregate;
pub mod app;
pub mod cli;
pub mod config;
pub mod fleet;
pub mod logging;
pub mod names;
pub mod observe;
pub mod pick;
pub mod prompt;
pub mod proxy;
pub mod rate;
pub mod reject;
pub mod reply;
pub mod route;
pub mod sim;
pub mod sse;
pub mod state;
