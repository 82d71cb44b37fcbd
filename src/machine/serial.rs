//! The console: a 16550 on COM1 (vm-superio's registers), with an output sink handed in and a bounded input queue.
//!
//! Shared between the vCPU threads (registers) and the owner (input), under one lock. The sink is written on vCPU
//! threads, byte by byte: it must not block for long, or it holds the guest. What it refuses is lost and counted. The
//! interrupt is an event descriptor that becomes the irqfd of GSI 4. A paused console (as every console begins) takes
//! input into its queue and raises no interrupt: nothing may change a guest that stands still.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::bus::BusDevice;
use super::counters::Counters;
use super::device::Device;
use crate::saved::{SaveSectionError, Saved, Section, SectionKind, SectionName, Sections, TakeSectionError};

/// Most bytes of input waiting for the guest, besides the 64 of the device itself: a terminal line and some.
pub const INPUT_BYTES_MAX: usize = 4096;

/// Receive buffer of the emulated device (vm-superio's FIFO).
const FIFO_BYTES: usize = 64;

/// Where the guest's output goes.
pub type ConsoleSink = Box<dyn Write + Send>;

/// The interrupt line.
#[derive(Debug)]
struct Interrupt {
    event: EventFd,
    paused: Cell<bool>,
    /// It was raised during the pause.
    raised: Cell<bool>,
}

impl Interrupt {
    /// A line that is paused.
    fn new() -> Result<Self, BuildSerialError> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BuildSerialError::Interrupt)?;
        Ok(Self { event, paused: Cell::new(true), raised: Cell::new(false) })
    }
}

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        if self.paused.get() {
            self.raised.set(true);
            return Ok(());
        }
        self.event.write(1)
    }
}

/// Counts what goes to the sink and what it refuses; never fails, so that the guest does not notice.
struct CountedSink {
    sink: ConsoleSink,
    counters: Arc<Counters>,
}

impl Write for CountedSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.counters.console_bytes.add();
            if self.sink.write_all(&[*byte]).is_err() {
                self.counters.console_lost.add();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // Errors show at the next byte.
        let _ = self.sink.flush();
        Ok(())
    }
}

/// Why a console could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildSerialError {
    /// The host gave no event descriptor.
    #[error("make the console's interrupt")]
    Interrupt(#[source] io::Error),
    /// Its saved state is not usable.
    #[error("console")]
    Saved(#[source] TakeSectionError),
}

/// The console.
pub struct SerialPort {
    // Fixed configuration: none. Runtime glue: the device holds interrupt and sink, and the interrupt whether it is
    // paused. Volatile state: the device's registers and `waiting`.
    device: Serial<Interrupt, NoEvents, CountedSink>,
    waiting: VecDeque<u8>,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("SerialPort").field("state", &self.device.state()).finish_non_exhaustive()
    }
}

impl SerialPort {
    /// A console as after reset; paused.
    pub fn new(sink: ConsoleSink, counters: Arc<Counters>) -> Result<Self, BuildSerialError> {
        let interrupt = Interrupt::new()?;
        Ok(Self { device: Serial::new(interrupt, CountedSink { sink, counters }), waiting: VecDeque::new() })
    }

    /// A console as it was saved; paused. An interrupt that was pending is raised again when it resumes.
    pub fn from_saved(
        sink: ConsoleSink,
        counters: Arc<Counters>,
        from: &mut Sections,
    ) -> Result<Self, BuildSerialError> {
        let saved = from.take::<SerialV1>(0).map_err(BuildSerialError::Saved)?;
        let (state, waiting) = saved.into_state().map_err(BuildSerialError::Saved)?;
        let interrupt = Interrupt::new()?;
        let device = Serial::from_state(&state, interrupt, NoEvents, CountedSink { sink, counters });
        let device = device.map_err(|_| BuildSerialError::Saved(invalid("registers the device does not take")))?;
        Ok(Self { device, waiting })
    }

    /// Event that raises the interrupt line.
    pub fn interrupt(&self) -> &EventFd {
        &self.device.interrupt_evt().event
    }

    /// Hands input to the guest; returns how many bytes were taken. The rest found the queue full: offer it again when
    /// the guest has read some.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let room = INPUT_BYTES_MAX.saturating_sub(self.waiting.len());
        let taken = bytes.len().min(room);
        self.waiting.extend(&bytes[..taken]);
        self.feed();
        taken
    }

    fn is_paused(&self) -> bool {
        self.device.interrupt_evt().paused.get()
    }

    /// Moves waiting input into the device as far as it has room.
    fn feed(&mut self) {
        let room = self.device.fifo_capacity().min(self.waiting.len());
        if room == 0 || self.is_paused() {
            return;
        }
        let chunk: Vec<u8> = self.waiting.iter().copied().take(room).collect();
        // An error is a lost interrupt, which the guest's next poll repairs, or loopback mode, which takes nothing.
        let taken = self.device.enqueue_raw_bytes(&chunk).unwrap_or(0);
        self.waiting.drain(..taken);
    }
}

impl Device for SerialPort {
    fn pause(&mut self) {
        self.device.interrupt_evt().paused.set(true);
    }

    fn resume(&mut self) {
        let interrupt = self.device.interrupt_evt();
        interrupt.paused.set(false);
        if interrupt.raised.take() {
            // A full counter is raised already.
            let _ = interrupt.event.write(1);
        }
        self.feed();
    }

    fn save(&self) -> Result<Vec<Section>, SaveSectionError> {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.device.state();
        let saved = SerialV1 {
            baud_divisor: [baud_divisor_low, baud_divisor_high],
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            received: in_buffer,
            waiting: self.waiting.iter().copied().collect(),
        };
        Ok(vec![Section::new(0, &saved)?])
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), [value]) = (u8::try_from(offset), data) {
            *value = self.device.read(offset);
            self.feed();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [value]) = (u8::try_from(offset), data) {
            // The sink does not fail; a lost interrupt is repaired by the guest's next poll.
            let _ = self.device.write(offset, *value);
        }
    }
}

/// Saved state of the console, version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SerialV1 {
    /// Divisor latch, low byte first.
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// Input in the device, oldest first.
    received: Vec<u8>,
    /// Input that waits for room in the device, oldest first.
    waiting: Vec<u8>,
}

impl Saved for SerialV1 {
    const KIND: SectionKind = SectionKind::Serial;
    const VERSION: u16 = 1;
}

fn invalid(reason: &str) -> TakeSectionError {
    let name = SectionName { kind: SectionKind::Serial, instance: 0 };
    TakeSectionError::Invalid { name, reason: reason.to_owned() }
}

impl SerialV1 {
    fn into_state(self) -> Result<(SerialState, VecDeque<u8>), TakeSectionError> {
        let Self {
            baud_divisor: [baud_divisor_low, baud_divisor_high],
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            received,
            waiting,
        } = self;
        if received.len() > FIFO_BYTES || waiting.len() > INPUT_BYTES_MAX {
            return Err(invalid("more input than the device holds"));
        }
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: received,
        };
        Ok((state, waiting.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Mutex, PoisonError};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);
    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }

    fn port(sink: impl Write + Send + 'static) -> (SerialPort, Arc<Counters>) {
        let counters = Arc::new(Counters::default());
        let mut port = SerialPort::new(Box::new(sink), Arc::clone(&counters)).unwrap();
        port.resume();
        (port, counters)
    }

    fn saved(port: &SerialPort) -> Sections {
        let mut sections = Sections::new();
        port.save().unwrap().into_iter().for_each(|section| sections.push(section).unwrap());
        sections
    }

    #[test]
    fn output_reaches_the_sink_and_a_broken_sink_is_counted() {
        let sink = Shared::default();
        let (mut port_ok, _) = port(sink.clone());
        b"hi".iter().for_each(|byte| port_ok.write(0, &[*byte]));
        assert_eq!(*sink.0.lock().unwrap(), b"hi");
        let (mut broken, counters) = port(Broken);
        broken.write(0, b"x");
        let counted = counters.snapshot();
        assert_eq!((counted.console_bytes, counted.console_lost), (1, 1));
    }

    #[test]
    fn input_is_bounded_and_keeps_its_order() {
        let (mut port, _) = port(Shared::default());
        let typed: Vec<u8> = (0..=u8::MAX).cycle().take(3 * INPUT_BYTES_MAX).collect();
        let mut taken = 0;
        loop {
            match port.input(&typed[taken..]) {
                0 => break,
                more => taken += more,
            }
        }
        assert!((INPUT_BYTES_MAX..=INPUT_BYTES_MAX + FIFO_BYTES).contains(&taken), "{taken}");
        let mut read = Vec::new();
        let mut byte = [0];
        for _ in 0..taken {
            port.read(0, &mut byte);
            read.push(byte[0]);
        }
        assert_eq!(read, typed[..taken]);
        port.read(5, &mut byte);
        assert_eq!(byte[0] & 1, 0, "no data is ready any more");
    }

    #[test]
    fn a_paused_console_keeps_input_and_raises_nothing() {
        let (mut port, _) = port(Shared::default());
        // Interrupt when input is there.
        port.write(1, &[1]);
        port.pause();
        assert_eq!(port.input(b"abc"), 3);
        let mut byte = [0];
        port.read(5, &mut byte);
        assert_eq!(byte[0] & 1, 0, "input reached a paused device");
        assert!(port.interrupt().read().is_err());
        port.resume();
        port.read(0, &mut byte);
        assert_eq!(byte, *b"a");
        assert_eq!(port.interrupt().read().unwrap(), 1);
    }

    #[test]
    fn saved_and_restored_is_the_same() {
        let (mut first, counters) = port(Shared::default());
        first.write(1, &[0x0f]);
        first.write(7, &[0x5a]);
        first.input(&[7; 100]);
        let before = saved(&first);
        let mut taken = before.clone();
        let second = SerialPort::from_saved(Box::new(Shared::default()), counters, &mut taken).unwrap();
        taken.finish().unwrap();
        assert_eq!(saved(&second), before);
    }

    #[test]
    fn too_much_saved_input_is_refused() {
        let (first, counters) = port(Shared::default());
        let mut state: SerialV1 = saved(&first).take(0).unwrap();
        state.received = vec![0; FIFO_BYTES + 1];
        let mut sections = Sections::new();
        sections.push(Section::new(0, &state).unwrap()).unwrap();
        assert!(SerialPort::from_saved(Box::new(Broken), counters, &mut sections).is_err());
    }

    fn example() -> SerialV1 {
        SerialV1 {
            baud_divisor: [1, 2],
            interrupt_enable: 3,
            interrupt_identification: 4,
            line_control: 5,
            line_status: 6,
            modem_control: 7,
            modem_status: 8,
            scratch: 9,
            received: vec![10, 11],
            waiting: vec![12],
        }
    }

    /// The golden keeps the encoding: changing it needs a new version.
    #[test]
    fn the_encoding_is_what_it_was() {
        let bytes = Section::new(0, &example()).unwrap().bytes;
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("../../tests/golden/saved_serial_v1.hex").trim_end());
    }
}
