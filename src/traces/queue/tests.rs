//! Tests of the queue: order, bounds, what is dropped.

use std::time::Duration;

use super::*;

const FORM: AnswerForm = AnswerForm { api: TraceApi::Chat, stream: true, status: 200 };

fn facts() -> CallFacts {
    CallFacts {
        trace_id: String::new(),
        session_id: String::new(),
        api: TraceApi::Chat,
        stream: true,
        client_model: None,
        request_id: String::new(),
        weight_version: None,
        arrived: 0.0,
        latency: Duration::ZERO,
        first_token: None,
        queued: None,
        upstream: None,
        attempts: 1,
        status: 200,
        error: None,
        partial: false,
        cumulative: None,
    }
}

/// With room for so many bytes.
fn buffer(bytes: usize) -> AnswerBuffer {
    let mut buffer = AnswerBuffer::default();
    buffer.reserve(bytes);
    buffer
}

fn end(mark: &Arc<CaptureMark>, rest: usize) -> TraceMessage {
    let call = EndedCall {
        facts: facts(),
        request: Bytes::new(),
        inserted: None,
        answer: Some(FORM),
        rest: buffer(rest),
        replaced: None,
        stored: None,
        pending: None,
    };
    TraceMessage::End { mark: mark.clone(), call: Box::new(call) }
}

fn piece(mark: &Arc<CaptureMark>, bytes: usize) -> TraceMessage {
    TraceMessage::Piece { mark: mark.clone(), form: FORM, part: buffer(bytes) }
}

fn ids(batch: &[TraceMessage]) -> Vec<Option<u64>> {
    batch.iter().map(|message| message.mark().map(|mark| mark.id)).collect()
}

#[tokio::test]
async fn the_oldest_call_is_dropped_when_there_are_too_many() {
    let queue = CaptureQueue::new(2);
    let marks: Vec<_> = (0..4).map(CaptureMark::new).collect();
    assert_eq!(marks.iter().map(|mark| queue.push(end(mark, 10))).collect::<Vec<_>>(), [0, 0, 1, 1]);
    let mut batch = Vec::new();
    assert!(queue.take(&mut batch, 10).await);
    assert_eq!(ids(&batch), [Some(2), Some(3)]);
    assert_eq!((queue.dropped(), queue.size()), (2, (0, 0)));
}

#[tokio::test]
async fn a_dropped_call_sends_nothing_more() {
    let queue = CaptureQueue::bounded(100, 4_000);
    let (long, short) = (CaptureMark::new(1), CaptureMark::new(2));
    assert_eq!(queue.push(piece(&long, 3_000)), 0);
    assert_eq!(queue.push(end(&short, 1_000)), 1, "the bytes of both are too many");
    assert_eq!(queue.push(piece(&long, 10)) + queue.push(end(&long, 10)), 0);
    let mut batch = Vec::new();
    assert!(queue.take(&mut batch, 10).await);
    assert_eq!(ids(&batch), [Some(2)]);
    assert!(long.is_dropped() && queue.dropped() == 1);
}

#[tokio::test]
async fn the_buffers_of_captures_count_among_the_bytes() {
    let queue = CaptureQueue::bounded(100, 4_000);
    queue.buffer_grows(2_000);
    assert_eq!(queue.push(end(&CaptureMark::new(1), 1_000)), 0);
    assert_eq!(queue.push(end(&CaptureMark::new(2), 1_000)), 1);
    queue.buffer_goes(2_000);
    assert_eq!(queue.push(end(&CaptureMark::new(3), 1_000)), 0);
    assert_eq!(queue.size(), (2, 2 * (1_000 + MESSAGE_BYTES)));
}

#[tokio::test]
async fn a_call_that_was_dropped_counts_once_and_flushes_stay() {
    let queue = CaptureQueue::bounded(1, 1 << 20);
    let (first, second) = (CaptureMark::new(1), CaptureMark::new(2));
    let (told, mut heard) = oneshot::channel();
    queue.push(piece(&first, 10));
    queue.push(TraceMessage::Flush(told));
    queue.push(end(&first, 10));
    assert_eq!(queue.push(end(&second, 10)), 1);
    assert!(heard.try_recv().is_err());
    let mut batch = Vec::new();
    assert!(queue.take(&mut batch, 10).await);
    assert_eq!(ids(&batch), [None, Some(2)]);
    assert_eq!(queue.dropped(), 1);
}

#[tokio::test]
async fn flushes_that_nothing_waits_for_do_not_pile_up() {
    let queue = CaptureQueue::new(10);
    let mut waiting = Vec::new();
    for at in 0..1_000 {
        let (told, heard) = oneshot::channel();
        queue.push(TraceMessage::Flush(told));
        if at % 100 == 0 {
            waiting.push(heard);
        }
    }
    let mut batch = Vec::new();
    assert!(queue.take(&mut batch, 1_000).await);
    assert!(batch.len() <= MAX_FLUSHES + 1 && batch.len() >= waiting.len(), "{}", batch.len());
    assert_eq!(queue.size(), (0, 0));
    queue.push(end(&CaptureMark::new(1), 1));
    assert_eq!((queue.clear(), queue.size()), (1, (0, 0)));
}

#[tokio::test(start_paused = true)]
async fn messages_gather_until_something_waits_for_one() {
    let (queue, begun) = (CaptureQueue::new(10), Instant::now());
    let mut batch = Vec::new();
    queue.push(end(&CaptureMark::new(1), 1));
    assert!(timeout_at(begun + MAX_GATHER_TIME / 2, queue.take(&mut batch, 10)).await.is_err());
    queue.push(end(&CaptureMark::new(2), 1));
    assert!(queue.take(&mut batch, 10).await);
    assert_eq!((ids(&batch), begun.elapsed() / 5), (vec![Some(1), Some(2)], MAX_GATHER_TIME / 5));
    batch.clear();
    let begun = Instant::now();
    queue.push(end(&CaptureMark::new(3), 1));
    let flush = async {
        tokio::task::yield_now().await;
        queue.push(TraceMessage::Flush(oneshot::channel().0));
    };
    assert!(tokio::join!(queue.take(&mut batch, 10), flush).0);
    assert_eq!((ids(&batch), begun.elapsed()), (vec![Some(3), None], Duration::ZERO));
    queue.push(piece(&CaptureMark::new(4), MAX_GATHERED_BYTES));
    assert!(queue.take(&mut batch, 10).await);
    assert_eq!(begun.elapsed(), Duration::ZERO, "so many bytes do not wait");
}

#[tokio::test]
async fn a_closed_queue_ends_once_it_is_empty() {
    let queue = CaptureQueue::new(10);
    let mark = CaptureMark::new(1);
    queue.push(end(&mark, 1));
    queue.close();
    assert_eq!(queue.push(end(&CaptureMark::new(2), 1)), 1);
    let mut batch = Vec::new();
    assert!(queue.take(&mut batch, 10).await);
    batch.clear();
    assert!(!queue.take(&mut batch, 10).await);
}

#[tokio::test(start_paused = true)]
async fn calls_do_not_gather_when_the_queue_is_half_full() {
    let queue = CaptureQueue::new(2);
    let marks: Vec<_> = (0..2).map(CaptureMark::new).collect();
    marks.iter().for_each(|mark| assert_eq!(queue.push(end(mark, 10)), 0));
    let (begun, mut batch) = (Instant::now(), Vec::new());
    assert!(queue.take(&mut batch, 10).await);
    assert_eq!((begun.elapsed(), ids(&batch)), (Duration::ZERO, vec![Some(0), Some(1)]));
    // Once it is empty, calls gather again.
    queue.push(end(&CaptureMark::new(3), 10));
    batch.clear();
    assert!(queue.take(&mut batch, 10).await);
    assert_eq!(begun.elapsed(), MAX_GATHER_TIME);
}

#[test]
fn messages_keep_a_share_of_the_bytes_whatever_the_buffers_take() {
    let queue = CaptureQueue::bounded(10, 8 << 10);
    queue.buffer_grows(1 << 20);
    assert_eq!(queue.push(end(&CaptureMark::new(1), 1 << 10)), 0);
    assert_eq!(queue.push(end(&CaptureMark::new(2), 1 << 10)), 1);
}

#[test]
fn an_answer_that_is_given_up_is_noticed() {
    let queue = CaptureQueue::new(10);
    let (before, mark) = (queue.discards(), CaptureMark::new(1));
    queue.discard(&mark);
    assert!(mark.is_dropped() && queue.discards() != before && queue.dropped() == 0);
}
