//! The parts of the balancer that the admin API shows and changes.

use std::sync::Arc;

use super::fleet_editor::FleetEditor;
use crate::fleet::Fleet;
use crate::observe::Observer;
use crate::state::State;
use crate::state::members::Members;
use crate::state::redis::SiblingExchange;
use crate::traces::Traces;

/// The parts of the balancer that the admin API shows and changes.
pub(crate) struct AdminParts {
    pub fleet: Arc<Fleet>,
    pub state: Arc<State>,
    pub traces: Arc<Traces>,
    pub observer: Observer,
    /// The exchange with siblings; `None` without a Redis.
    pub exchange: Option<Arc<SiblingExchange>>,
    /// The records of run-time changes.
    pub members: Arc<Members>,
    /// The host name of this machine.
    pub host: String,
    /// What answers call this balancer: the host and the listeners for clients.
    pub name: String,
}

impl AdminParts {
    /// The way to change the fleet.
    pub(crate) fn editor(&self) -> FleetEditor<'_> {
        FleetEditor {
            fleet: &self.fleet,
            members: &self.members,
            is_shared: self.exchange.is_some(),
            observer: &self.observer,
        }
    }
}
