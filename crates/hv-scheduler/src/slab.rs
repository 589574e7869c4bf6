//! Values by number: dense, so that a number is an index, and with the numbers of what is gone given out again.

/// Numbers that come and go.
#[derive(Clone, Debug)]
pub(crate) struct Slab<T> {
    slots: Vec<Option<T>>,
    spare: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), spare: Vec::new() }
    }
}

impl<T> Slab<T> {
    pub(crate) fn insert(&mut self, value: T) -> u32 {
        if let Some(number) = self.spare.pop() {
            self.slots[number as usize] = Some(value);
            return number;
        }
        self.slots.push(Some(value));
        self.slots.len() as u32 - 1
    }

    pub(crate) fn remove(&mut self, number: u32) -> Option<T> {
        let value = self.slots[number as usize].take();
        self.spare.extend(value.is_some().then_some(number));
        value
    }

    pub(crate) fn get(&self, number: u32) -> &T {
        self.slots[number as usize].as_ref().expect("numbers are given out by this slab")
    }

    pub(crate) fn get_mut(&mut self, number: u32) -> &mut T {
        self.slots[number as usize].as_mut().expect("numbers are given out by this slab")
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.slots.iter().enumerate().filter_map(|(number, slot)| Some((number as u32, slot.as_ref()?)))
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.spare.len()
    }
}
