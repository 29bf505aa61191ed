//! Responses that are generated without a client, each in a task of its own. All events of a response that
//! was requested as a stream are kept (`event_log`), so that a client that connects later receives them from
//! any number on. The task never waits for a reader.

use std::sync::Arc;

use super::driver::{Generation, Step};
use super::event_log::EventLog;
use super::reply::{self, Reply};
use super::responses_form::{ResponseProgress, ResponsesReplyForm};
use super::responses_stream::ResponseWriter;
use super::run::EngineCall;
use super::stream::{EventWriter, ReplyEvents};

/// Answers at once; the generation continues without a client until it ends or is cancelled.
pub(super) fn begin(
    call: &EngineCall,
    form: ResponsesReplyForm,
    generation: Generation,
    streams: bool,
) -> Reply {
    let store = &call.shared.store;
    let begun = form.response(if streams { ResponseProgress::Running } else { ResponseProgress::Queued });
    let id = form.id.clone();
    form.store(store, &begun);
    let log = EventLog::new();
    let answer = if streams { log.follow(0) } else { reply::ok(&begun) };
    store.attach_log(&id, streams.then(|| Arc::clone(&log)));
    let writer = ResponseWriter::new(form, Arc::clone(&call.shared));
    let task = tokio::spawn(work(generation, writer, EndLogOnDrop(log)));
    store.attach(&id, task.abort_handle());
    answer
}

/// Ends the log also when the work is cancelled.
struct EndLogOnDrop(Arc<EventLog>);

impl Drop for EndLogOnDrop {
    fn drop(&mut self) {
        self.0.end();
    }
}

async fn work(mut generation: Generation, mut writer: ResponseWriter, ending: EndLogOnDrop) {
    let mut events = ReplyEvents::default();
    writer.open(&mut events);
    ending.0.append(events.take());
    loop {
        let step = generation.next().await;
        writer.write(step, &mut events);
        ending.0.append(events.take());
        if step == Step::End {
            return;
        }
    }
}
