//! What libvirtd says by itself, and what that means for the machines here.

use std::sync::Arc;

use hv_driver::DriverEvent;
use tokio::sync::mpsc;

use crate::inner::{Found, Inner};
use crate::files::instance_of;
use crate::link::Notice;
use crate::machine::Machine;
use crate::protocol::event;
use crate::rpc::Event;
use crate::xdr::{Malformed, Reader};

/// Listens until the driver ends.
pub(crate) fn spawn(inner: &Arc<Inner>, mut heard: mpsc::Receiver<Notice>) {
    let (driver, cancelled) = (Arc::downgrade(inner), inner.shared.link.cancelled.clone());
    tokio::spawn(async move {
        loop {
            let notice = tokio::select! {
                () = cancelled.cancelled() => return,
                notice = heard.recv() => notice,
            };
            let (Some(notice), Some(driver)) = (notice, driver.upgrade()) else { return };
            match notice {
                // Events may have been missed: everything is looked at anew.
                Notice::Connected => {
                    for machine in driver.known() {
                        look_at(machine, String::new());
                    }
                }
                Notice::Said(said) => {
                    if let Err(error) = hear(&driver, &said) {
                        tracing::warn!(%error, procedure = said.procedure, "an event cannot be read");
                    }
                }
            }
        }
    });
}

/// In a task of its own, because one machine must not hold up the others.
fn look_at(machine: Arc<Machine>, what: String) {
    tokio::spawn(async move { machine.check_ended(&what).await });
}

fn hear(driver: &Arc<Inner>, said: &Event) -> Result<(), Malformed> {
    let mut reader = Reader::new(&said.body);
    let _callback = reader.i32()?;
    let domain = reader.domain()?;
    let Some(id) = instance_of(&domain.name) else { return Ok(()) };
    // Another driver's machine, perhaps.
    let Ok(Found::Whole(machine)) = driver.find(&id, "watch") else { return Ok(()) };
    let tell = |what: &str| {
        let event = DriverEvent { id: id.clone(), what: what.to_owned() };
        // Nobody listening is no error.
        let _ = driver.shared.events.send(event);
    };
    match said.procedure {
        event::LIFECYCLE => {
            let (event, detail) = (reader.i32()?, reader.i32()?);
            match event {
                event::STOPPED | event::CRASHED => look_at(machine, "it stopped".to_owned()),
                event::SUSPENDED if detail == event::SUSPENDED_IOERROR => {
                    tell("it stands still because a disk failed");
                }
                _ => {}
            }
        }
        event::IO_ERROR => tell("a disk failed"),
        event::DEVICE_REMOVED => tracing::debug!(instance = %id, "a device is gone"),
        _ => {}
    }
    Ok(())
}
