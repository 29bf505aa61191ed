//! vllm-lb: several vLLM servers behind one API.
//!
//! # The way of one request
//!
//! ```text
//! proxy::carry::carry          one request reads as this function, from its head to its end
//!   intake::take_in            head -> route::api_paths -> peek: body -> prompt::{scan,canon} -> facts
//!                              where a route says so: route::{virtual_models,rewrite,translate}
//!   choose::choose             fleet.snapshot().candidates(), state.weigh(chain) -> pick::pick -> lease
//!   attempt::attempt           connection, head and held body in one write, answer's head, first event
//!   retry::decide              what failed, what is held -> another attempt or none
//!   relay::relay               pieces -> reply::usage, route::answer -> client; deadlines; the outcome
//!   record::write              the lease has dropped: Observer::request_done
//! ```
//!
//! # Layers: a module imports only downwards (held by `tests/it/tidy`)
//!
//! ```text
//! L4   main  cli  app                                   assembly: the only code that knows everything
//! L3   proxy | admin | engine::http                        edges; never each other; pingora only in proxy
//! L2b  fleet  state  traces  otlp                       things with tasks, sockets, locks
//! L2a  observe  logging  system_roots                   one door for logs, metrics, and trust
//! L1   prompt route retry pick reply sse aggregate config breaker prefix_index exchange sessions doctor
//! L1   json engine cache batch dice simulate record assemble probe_duty sight trace_context dashboard
//! L1   top messages slices                                pure: time and chance come in
//! L0   config::{types,setting,redis,postgres,url,values,spelling,problem,secret}  vocabulary
//! L0   reject  names  rate                              vocabulary
//! ```
//!
//! # Words
//!
//! `upstream` one vLLM server, `model` the name a client sends, `route` a configured rule: the requests it
//! matches, their upstreams and its edits, `plan` the prepared route, `block` a hashed piece of a
//! prompt and `chain` all of them, `hit` leading blocks that an upstream is believed to hold, `candidate` a
//! ready upstream as numbers, `choice` what `pick` returns, `lease` one request in flight on one upstream (a
//! guard), `outcome` how it ended, `snapshot` immutable view of the fleet, `reject` any refusal of our own,
//! `knob` a tunable of `pick`, `balancer` one running vllm-lb, `sibling` another one on the same Redis.

// A module is public only as far as the program, the tests and the benches use it: no other crate does.
#![warn(unreachable_pub)]

pub(crate) mod admin;
pub(crate) mod aggregate;
pub mod app;
pub mod cli;
pub mod config;
pub(crate) mod dashboard;
pub(crate) mod doctor;
pub mod engine;
pub mod fleet;
pub(crate) mod json;
pub mod logging;
pub(crate) mod names;
pub mod observe;
pub(crate) mod otlp;
pub mod pick;
pub mod prompt;
pub(crate) mod proxy;
pub(crate) mod rate;
pub mod reject;
pub mod reply;
pub(crate) mod retry;
pub mod route;
pub mod simulate;
pub mod sse;
pub mod state;
pub(crate) mod system_roots;
pub(crate) mod top;
pub mod traces;
