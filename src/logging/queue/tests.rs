//! The queue with a writer of each test's own.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;

const LIMITS: LogQueueLimits = LogQueueLimits { records: 4, bytes: 100 };

/// Longer than any test takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// What has been written, and the results of the next writes: so many bytes, or an error. Without further
/// ones every write succeeds.
#[derive(Clone, Default)]
struct TestOutput {
    written: Arc<Mutex<Vec<u8>>>,
    results: Arc<Mutex<VecDeque<io::Result<usize>>>>,
}

impl TestOutput {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.written.lock().expect("no writer panics")).into_owned()
    }
}

impl Write for TestOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let result = self.results.lock().expect("no writer panics").pop_front();
        let count = result.transpose()?.unwrap_or(bytes.len());
        self.written.lock().expect("no writer panics").extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An output whose reader takes one write for each message.
struct StalledOutput {
    output: TestOutput,
    taken: Receiver<()>,
}

impl Write for StalledOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // After the last message the reader takes everything.
        self.taken.recv().ok();
        self.output.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn queue() -> Arc<LogQueue> {
    Arc::new(LogQueue::new(LIMITS))
}

fn push(queue: &LogQueue, records: impl IntoIterator<Item = u64>) {
    records.into_iter().for_each(|number| queue.push(format!("{number}\n")));
}

fn start(queue: &Arc<LogQueue>, output: impl Write + Send + 'static) {
    let queue = queue.clone();
    thread::spawn(move || queue.write_to(output, |count| format!("dropped {count}\n")));
}

fn stalled() -> (StalledOutput, TestOutput, Sender<()>) {
    let (sender, taken) = channel();
    let output = TestOutput::default();
    (StalledOutput { output: output.clone(), taken }, output, sender)
}

#[test]
fn records_beyond_the_limit_are_dropped_and_reported_in_their_place() {
    let (queue, output) = (queue(), TestOutput::default());
    push(&queue, 1..=7);
    start(&queue, output.clone());
    queue.flush(PATIENCE);
    assert_eq!(output.text(), "1\n2\n3\n4\ndropped 3\n");
    push(&queue, 8..=9);
    queue.flush(PATIENCE);
    assert_eq!((output.text().as_str(), queue.dropped()), ("1\n2\n3\n4\ndropped 3\n8\n9\n", 3));
}

#[test]
fn after_a_drop_records_enter_again_once_half_of_the_queue_is_free() {
    let queue = queue();
    push(&queue, 1..=5);
    let record = |number: u64| LogQueueEntry::Record(format!("{number}\n"));
    assert_eq!(queue.next(), record(1));
    push(&queue, [6]);
    assert_eq!(queue.next(), record(2));
    push(&queue, [7]);
    for entry in [record(3), record(4), LogQueueEntry::Dropped(2), record(7)] {
        assert_eq!(queue.next(), entry);
    }
}

#[test]
fn bytes_are_limited_and_one_large_record_alone_fits() {
    let queue = queue();
    for length in [150, 1] {
        queue.push("x".repeat(length));
    }
    assert_eq!(queue.dropped(), 1);
    assert_eq!(queue.next(), LogQueueEntry::Record("x".repeat(150)));
    for length in [60, 40, 1] {
        queue.push("y".repeat(length));
    }
    assert_eq!(queue.dropped(), 2);
}

/// Regression: a thread that logged waited for what reads standard output.
#[test]
fn a_stalled_output_holds_up_neither_records_nor_the_end() {
    let queue = queue();
    let (stalled, output, taken) = stalled();
    start(&queue, stalled);
    push(&queue, 1..=100);
    queue.flush(Duration::from_millis(1));
    assert_eq!(output.text(), "");
    taken.send(()).expect("the writer waits");
    drop(taken);
    queue.flush(PATIENCE);
    let text = output.text();
    // The writer may have taken the first record out before the queue was full, or not.
    let expected = ["1\n2\n3\n4\ndropped 96\n", "1\n2\n3\n4\n5\ndropped 95\n"];
    assert!(expected.contains(&text.as_str()), "{text}");
}

#[test]
fn a_failed_write_is_counted_and_reported_before_the_next_record() {
    let (queue, output) = (queue(), TestOutput::default());
    let full_disk = || Err(io::Error::from(ErrorKind::StorageFull));
    *output.results.lock().expect("is new") = VecDeque::from([
        Ok(1),
        full_disk(),
        Err(ErrorKind::Interrupted.into()),
        Err(ErrorKind::WouldBlock.into()),
    ]);
    push(&queue, 1001..=1003);
    start(&queue, output.clone());
    queue.flush(PATIENCE);
    assert_eq!((output.text().as_str(), queue.dropped()), ("1\ndropped 1\n1002\n1003\n", 1));
}
